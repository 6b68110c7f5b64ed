"""The exception of this package."""

from __future__ import annotations


class DataError(ValueError):
    """Something is wrong with the data: one sentence that names the file and line, the picture or the sample.

    Attributes:
        reason: a few words by which samples that are left out are counted, such as "missing file".
    """

    def __init__(self, message: str, *, reason: str = "broken sample") -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return _again, (str(self), self.reason)


def _again(message: str, reason: str) -> DataError:
    return DataError(message, reason=reason)
