"""A JSON file that is one array of objects."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

from .errors import DataError
from .files import DataFile
from .row import checked_values

_CHUNK = 1 << 18
_LONGEST_ENTRY = 1 << 28
_WORD = 16  # an error so near the end of what is read may be one of a word that is cut, such as "tr"


def is_array(file: DataFile) -> bool:
    """Whether a file begins as an array; OSError where it cannot be read."""
    with file.open() as content:
        return content.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


class ArrayIndex:
    """The entries of an array, held in memory."""

    def __init__(self, file: DataFile) -> None:
        self.file = file
        try:
            with file.open() as content:
                self._entries: list[Any] = json.loads(content.read().decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise DataError(f"{file.name} is not UTF-8 (byte {error.start + 1})") from error
        except json.JSONDecodeError as error:
            message = f"{file.name}:{error.lineno}: this is not JSON ({error.msg}, column {error.colno})"
            raise DataError(message) from error

    def __len__(self) -> int:
        return len(self._entries)

    def values(self, index: int) -> dict[str, Any]:
        """The columns of a row."""
        return checked_values(self._entries[index])

    def place(self, index: int) -> str:
        """The file and entry."""
        return f"{self.file.name}, entry {index + 1}"


class ArrayStream:
    """The entries of an array one by one, never the whole. A position is the byte (unpacked) where one begins."""

    cut = None

    def __init__(self, file: DataFile) -> None:
        self.file = file
        self.seekable = file.compression is None

    def read(self, position: int, end: int | None = None) -> Iterator[tuple[int, Any]]:
        """The entries from a position on.

        Raises:
            DataError: what follows is not JSON; where the next entry begins is not known then.
        """
        decode_json = json.JSONDecoder().raw_decode
        with self.file.open(position) as content:
            text = _Text(content.read, position)
            if position == 0:
                text.skip("\ufeff")
                if text.next_character() != "[":
                    raise DataError(f"{self.file.name}: this is not an array")
                text.take(1)
            while (character := text.next_character()) != "]":
                if character == ",":
                    text.take(1)
                    continue
                try:
                    entry, stop = decode_json(text.text, text.at)
                    cut = stop == len(text.text) and not text.ended
                except json.JSONDecodeError as error:
                    unfinished = error.msg.startswith("Unterminated") or error.pos >= len(text.text) - _WORD
                    if text.ended or not unfinished or len(text.text) - text.at > _LONGEST_ENTRY:
                        begin = text.position
                        raise DataError(
                            f"{self.file.name}, byte {begin}: this is not JSON ({error.msg})", reason="bad row"
                        ) from error
                    cut = True
                if cut:
                    text.read_on()
                    continue
                yield text.position, entry
                text.take(stop - text.at)

    def values(self, position: int, payload: Any) -> dict[str, Any]:
        """The columns of a row that was read."""
        return checked_values(payload)

    def place(self, position: int) -> str:
        """The file and the byte where the entry begins."""
        return f"{self.file.name}, byte {position}"

    def quick_place(self, position: int, payload: Any) -> str:
        """The same."""
        return self.place(position)


class _Text:
    """The text of a file as far as it is needed, and at which byte we are."""

    def __init__(self, read: Any, position: int) -> None:
        self.position = position
        self.text = ""
        self.at = 0
        self.ended = False
        self._read = read
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._chunk = _CHUNK

    def read_on(self) -> None:
        """Read more, twice as much each time while nothing is taken: an entry that is long is tried a few times."""
        data = self._read(self._chunk)
        self.ended = not data
        self.text = self.text[self.at :] + self._decode(data, self.ended)
        self.at = 0
        self._chunk *= 2

    def take(self, characters: int) -> None:
        """Go on by some characters."""
        taken = self.text[self.at : self.at + characters]
        self.position += len(taken) if taken.isascii() else len(taken.encode())
        self.at += characters
        self._chunk = _CHUNK

    def skip(self, character: str) -> None:
        """Go on behind a character if it is the next."""
        if not self.text:
            self.read_on()
        if self.text.startswith(character, self.at):
            self.take(1)

    def next_character(self) -> str:
        """The next that is not blank; DataError where the text ends."""
        while True:
            while self.at < len(self.text):
                character = self.text[self.at]
                if character not in " \t\r\n":
                    return character
                self.take(1)
            if self.ended:
                raise DataError("the array is not closed: the file is cut off", reason="bad row")
            self.read_on()
