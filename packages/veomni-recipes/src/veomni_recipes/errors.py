"""What ends a run because of how it went, in one sentence."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """A run cannot go on: a step that is not finite, or memory that does not suffice."""
