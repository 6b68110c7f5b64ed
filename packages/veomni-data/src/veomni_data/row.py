"""A row of a data file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import DataError
from .prepared import is_prepared_row


class Row(dict[str, Any]):
    """A row of a data file, as a dict that knows where it comes from.

    Attributes:
        place: the file and line ("file:line"), row or sample, for messages.
        folder: the folder of that file, which paths in the row start from; None where it is not on this machine.
        source: the name of the source of a mixture; None without one.
        root: the folder that files which the row names must lie in; None = anywhere. See `resolve_path`.
    """

    def __init__(
        self,
        values: dict[str, Any],
        place: str,
        folder: Path | None,
        source: str | None = None,
        root: Path | None = None,
    ) -> None:
        super().__init__(values)
        self.place = place
        self.folder = folder
        self.source = source
        self.root = root

    def __reduce__(self) -> tuple[object, ...]:
        return Row, (dict(self), self.place, self.folder, self.source, self.root)


def checked_values(values: Any) -> dict[str, Any]:
    """The columns of a row; a DataError if what was read is not an object."""
    if not isinstance(values, dict):
        raise DataError(f"a row must be an object with named columns, not a {type(values).__name__}", reason="bad row")
    return values


def rename_columns(values: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row whose columns have our names.

    Args:
        values: the row.
        columns: our name to the column's in the file; "json.messages" is the entry "messages" of the column "json".
            "role" and "content" are not columns but the keys of the turns of a conversation.

    Raises:
        DataError: a column is not there.
    """
    of_turns = {theirs: ours for ours, theirs in columns.items() if ours in ("role", "content")}
    of_rows = {ours: theirs for ours, theirs in columns.items() if theirs not in of_turns}
    renamed = {ours: _column(values, theirs) for ours, theirs in of_rows.items()}
    taken = {theirs if theirs in values else theirs.partition(".")[0] for theirs in of_rows.values()}
    row = {key: value for key, value in values.items() if key not in taken} | renamed
    return {key: _rename_turns(value, of_turns) for key, value in row.items()} if of_turns else row


def _rename_turns(value: Any, names: Mapping[str, str]) -> Any:
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        return value
    return [{names.get(key, key): said for key, said in turn.items()} for turn in value]


def _column(values: dict[str, Any], name: str) -> Any:
    if name in values:
        return values[name]
    value: Any = values
    for key in name.split("."):
        if not isinstance(value, dict) or key not in value:
            raise DataError(f'there is no column "{name}": there are {", ".join(map(str, values))}', reason="bad row")
        value = value[key]
    return value


def transform_row(transform: Callable[[Row], Any], row: Row, place: Callable[[], str] | None = None) -> Any:
    """What a transform makes of a row; its errors name the row's place, or `place()` where that says more.

    A prepared row is a sample already, and stays what it is.
    """
    if is_prepared_row(row):
        return row
    try:
        return transform(row)
    except DataError as error:
        raise DataError(f"{place() if place else row.place}: {error}", reason=error.reason) from error
    except Exception as error:
        error.add_note(f"while transforming {row.place}")
        raise
