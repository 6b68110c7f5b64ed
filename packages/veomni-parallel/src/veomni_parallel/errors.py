"""The exception of this package."""

from __future__ import annotations


class ParallelError(ValueError):
    """A model, a batch or sizes that do not fit the ranks; the message is one sentence that says what would."""
