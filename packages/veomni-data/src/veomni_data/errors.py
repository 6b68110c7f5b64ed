"""The exception of this package."""

from __future__ import annotations


class DataError(ValueError):
    """Something is wrong with the data: one sentence that names the file and line, the picture or the sample."""
