"""The bytes that Python's pickler writes for DCP's records of chunks and of places, as patterns.

A record refers to names and classes by the numbers that the file's memo gave them, so that there is a general pattern,
and one for each file, made of the first record that the general one fits.
"""

from __future__ import annotations

import re

# pieces of the patterns of whole records: references to earlier values, numbers, shapes, short texts
_GET = rb"(?:h.|j.{4})"
_INT = rb"(?:K.|M..|J.{4}|\x8a(?:\x04.{4}|\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8}))"
_TUPLE = (
    rb"(?:\)|" + _INT + rb"\x85\x94|" + _INT + rb"{2}\x86\x94|" + _INT + rb"{3}\x87\x94|\(" + _INT + rb"{4,16}t\x94)"
)
_TEXT = rb"(?:" + _GET + rb"|\x8c.[^\x94]{0,255}\x94)"
_EMPTY = rb"\)\x81\x94}\x94\("  # a new instance and its state, up to the first attribute


def _shape_pattern(size_class: bytes) -> bytes:
    return rb"(?:" + _GET + rb"|" + size_class + _TUPLE + rb"\x85\x94R\x94)"


def chunk_pattern(gets: tuple[bytes, ...], size_again: bytes | None = None) -> re.Pattern[bytes]:
    """Groups: offsets, sizes."""
    chunk, offsets, sizes, size_class = gets
    first, second = _shape_pattern(size_class), _shape_pattern(size_again or size_class)
    return re.compile(chunk + _EMPTY + offsets + b"(" + first + b")" + sizes + b"(" + second + b")ub", re.DOTALL)


def place_pattern(gets: tuple[bytes, ...], offset_again: bytes | None = None) -> re.Pattern[bytes]:
    """Groups: name, offsets, file, offset, length."""
    index, fqn, hint, offset, size_class, info, path, length = gets
    key = index + _EMPTY + fqn + b"(" + _TEXT + b")" + hint + b"(?:N|" + _INT + b")"
    key += offset + b"(" + _shape_pattern(size_class) + b")ub"
    value = info + _EMPTY + path + b"(" + _TEXT + b")" + (offset_again or offset)
    value += b"(" + _INT + b")" + length + b"(" + _INT + b")ub"
    return re.compile(key + value, re.DOTALL)


def _named_gets(count: int) -> tuple[bytes, ...]:
    return tuple(b"(?P<g%d>" % position + _GET + b")" for position in range(count))


def number_of(raw: bytes) -> int:
    """The value of a match of `_INT`."""
    if raw[0] == 0x8A:
        return int.from_bytes(raw[2:], "little", signed=True)
    return int.from_bytes(raw[1:], "little", signed=raw[0] == 0x4A)


def reference_of(raw: bytes) -> int:
    """The number in the memo that a match of `_GET` refers to."""
    return int.from_bytes(raw[1:], "little")


NUMBERS = re.compile(_INT, re.DOTALL)
# the same with any reference for a known one: shows which numbers the memo of this file gave to names and classes
ANY_CHUNK = chunk_pattern(_named_gets(4), b"(?P=g3)")
ANY_PLACE = place_pattern(_named_gets(8), b"(?P=g3)")
