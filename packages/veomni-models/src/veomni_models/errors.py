"""The exception of this package."""

from __future__ import annotations


class ModelError(ValueError):
    """A model cannot be built from what was given; the message is one sentence that names it."""
