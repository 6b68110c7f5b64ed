"""A pickle reader that cannot run anything, for the few structures that torch's checkpoints are made of.

An unpickler with an allowlist is not enough: nine bytes can make it reserve a gigabyte for its memo. This one knows
only the opcodes that a pickler writes for plain data and instances, builds stand-ins, and holds each length against the
bytes that are there, so that its memory stays a small multiple of the file. It reads the file in windows.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

MAX_STRING = 65_535
MAX_STACK = 65_536  # a pickler hands over containers in batches of 1,000
MAX_MARKS = 64
WINDOW = 4 * 2**20
# more than any one opcode or record takes, so that what begins before it ends within the window
_MARGIN = 2 * MAX_STRING + 8_192


class PickleError(ValueError):
    """The bytes are no pickle of the kind that is read here; the message says why."""


class Global:
    """A name that the pickle may ask for. `call` makes a value of the arguments; None: it has instances only."""

    __slots__ = ("call", "name")

    def __init__(self, name: str, call: Callable[[tuple[Any, ...]], Any] | None = None) -> None:
        self.name = name
        self.call = call


class Instance:
    """Stands for an object of a class: nothing of the class is imported or called."""

    __slots__ = ("kind", "state")

    def __init__(self, kind: Global) -> None:
        self.kind = kind
        self.state: Any = None


class _Nested(tuple[Any, ...]):
    """A tuple that holds tuples; no tuple may hold it, so that nothing gets deep enough to harm what walks it."""

    __slots__ = ()


class _Unread:
    """Takes the place, in the memo, of parts of a record that was read as a whole."""


UNREAD = _Unread()


class PickleReader:
    """Reads one pickle; `load` may be called once.

    Args:
        read: gives up to n bytes, fewer only at the end, as a file's `read`.
        size: of the whole, in bytes.
        find: what a module and a name stand for; raises PickleError for what is not allowed.
        persistent: turns a persistent id into a value; None where there are none.
    """

    def __init__(
        self,
        read: Callable[[int], bytes],
        size: int,
        find: Callable[[str, str], Any],
        persistent: Callable[[Any], Any] | None = None,
    ) -> None:
        self._read = read
        self._unread_bytes = size
        self._find = find
        self._persistent = persistent
        self._data = b""
        self._at = 0
        self._low = -1
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: list[Any] = []
        # what a real file needs is one container in six bytes
        self._containers_left = 1_000 + size // 4
        self._handlers = self._make_handlers()

    def load(self) -> Any:
        """The value that the pickle describes.

        Raises:
            PickleError: an opcode, name or length that no checkpoint needs, or an end in the midst.
        """
        handlers, stack = self._handlers, self._stack
        try:
            while True:
                at = self._at
                if at > self._low:
                    self._refill()
                    at = self._at
                opcode = self._data[at]
                self._at = at + 1
                handler = handlers.get(opcode)
                if handler is not None:
                    handler()
                    if len(stack) > MAX_STACK:
                        raise PickleError(f"it holds more than {MAX_STACK} values at once")
                elif opcode == 0x2E:  # STOP
                    break
                else:
                    raise PickleError(f"it has the opcode {bytes([opcode])!r}, which no checkpoint needs")
            if len(stack) != 1 or self._marks:
                raise PickleError("it ends with an unfinished value")
        except (IndexError, struct.error):
            raise PickleError("it ends too soon") from None
        return stack[0]

    def _refill(self) -> None:
        if self._unread_bytes > 0:
            more = self._read(min(WINDOW, self._unread_bytes))
            self._unread_bytes = self._unread_bytes - len(more) if more else 0
            self._data = self._data[self._at :] + more
            self._at = 0
        self._low = len(self._data) - _MARGIN if self._unread_bytes > 0 else len(self._data)

    def _take(self, count: int) -> bytes:
        end = self._at + count
        data = self._data[self._at : end]
        if len(data) != count:
            raise PickleError("it ends too soon")
        self._at = end
        return data

    def _push_container(self, value: Any) -> None:
        self._containers_left -= 1
        if self._containers_left < 0:
            raise PickleError("it builds more than a file of its size can describe")
        self._stack.append(value)

    def _make_handlers(self) -> Mapping[int, Callable[[], None]]:
        named: dict[bytes, Callable[[], None]] = {
            b"\x80": self._protocol,
            b"\x95": self._frame,
            b"(": self._mark,
            b"N": lambda: self._stack.append(None),
            b"\x88": lambda: self._stack.append(True),
            b"\x89": lambda: self._stack.append(False),
            b"K": self._int1,
            b"M": lambda: self._stack.append(int.from_bytes(self._take(2), "little")),
            b"J": lambda: self._stack.append(int.from_bytes(self._take(4), "little", signed=True)),
            b"\x8a": self._long1,
            b"G": lambda: self._stack.append(struct.unpack(">d", self._take(8))[0]),
            b"\x8c": lambda: self._string(self._take(1)[0]),
            b"X": lambda: self._string(int.from_bytes(self._take(4), "little")),
            b"\x8d": lambda: self._string(int.from_bytes(self._take(8), "little")),
            b")": lambda: self._stack.append(()),
            b"]": lambda: self._push_container([]),
            b"}": lambda: self._push_container({}),
            b"\x85": lambda: self._tuple(self._pop(1)),
            b"\x86": lambda: self._tuple(self._pop(2)),
            b"\x87": lambda: self._tuple(self._pop(3)),
            b"t": lambda: self._tuple(self._pop_mark()),
            b"a": lambda: self._extend(self._pop(1)),
            b"e": lambda: self._extend(self._pop_mark()),
            b"s": lambda: self._update(self._pop(2)),
            b"u": lambda: self._update(self._pop_mark()),
            b"\x94": self._memoize,
            b"q": lambda: self._put(self._take(1)[0]),
            b"r": lambda: self._put(int.from_bytes(self._take(4), "little")),
            b"h": self._get1,
            b"j": self._get4,
            b"c": self._global,
            b"\x93": self._stack_global,
            b"\x81": self._new,
            b"R": self._reduce,
            b"b": self._build,
            b"Q": self._persistent_id,
        }
        return {opcode[0]: handler for opcode, handler in named.items()}

    def _protocol(self) -> None:
        if (protocol := self._take(1)[0]) > 5:
            raise PickleError(f"it is of pickle protocol {protocol}")

    def _frame(self) -> None:
        length = int.from_bytes(self._take(8), "little")
        if length > len(self._data) - self._at + self._unread_bytes:
            raise PickleError("it ends too soon")

    def _mark(self) -> None:
        if len(self._marks) == MAX_MARKS:
            raise PickleError("it is nested too deep")
        self._marks.append(len(self._stack))

    def _pop(self, count: int) -> list[Any]:
        begin = len(self._stack) - count
        if begin < (self._marks[-1] if self._marks else 0):
            raise PickleError("it takes more values than it has")
        values = self._stack[begin:]
        del self._stack[begin:]
        return values

    def _pop_mark(self) -> list[Any]:
        if not self._marks:
            raise PickleError("it takes more values than it has")
        begin = self._marks.pop()
        values = self._stack[begin:]
        del self._stack[begin:]
        return values

    def _top(self, kind: type) -> Any:
        value = self._stack[-1] if self._stack else None
        if type(value) is not kind:
            raise PickleError(f"it has a {type(value).__name__} where a {kind.__name__} belongs")
        return value

    def _int1(self) -> None:
        self._stack.append(self._data[self._at])
        self._at += 1

    def _long1(self) -> None:
        if (length := self._take(1)[0]) > 9:
            raise PickleError("it has a number of more than 64 bits")
        self._stack.append(int.from_bytes(self._take(length), "little", signed=True))

    def _string(self, length: int) -> None:
        if length > MAX_STRING:
            raise PickleError(f"it has a text of {length} bytes")
        try:
            self._stack.append(self._take(length).decode())
        except UnicodeDecodeError:
            raise PickleError("it has a text that is not UTF-8") from None

    def _tuple(self, values: list[Any]) -> None:
        for value in values:
            if isinstance(value, tuple):
                if isinstance(value, _Nested):
                    raise PickleError("it is nested too deep")
                self._push_container(_Nested(values))
                return
        self._push_container(tuple(values))

    def _extend(self, values: list[Any]) -> None:
        self._top(list).extend(values)

    def _update(self, values: list[Any]) -> None:
        target = self._top(dict)
        if len(values) % 2:
            raise PickleError("it has a key without a value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # a text or a stand-in costs nothing to compare; a tuple, or many chosen numbers, can be made to cost much
            if type(key) not in (str, Instance):
                raise PickleError(f"it has a {type(key).__name__} as a key")
            target[key] = value

    def _memoize(self) -> None:
        if not self._stack:
            raise PickleError("it takes more values than it has")
        self._memo.append(self._stack[-1])

    def _put(self, index: int) -> None:
        # picklers number in sequence; anything else would let a few bytes claim gigabytes
        if index != len(self._memo):
            raise PickleError(f"it stores value {index} when {len(self._memo)} are known")
        self._memoize()

    def _get1(self) -> None:
        self._get(self._take(1)[0], self._at - 2)

    def _get4(self) -> None:
        self._get(int.from_bytes(self._take(4), "little"), self._at - 5)

    def _get(self, index: int, begin: int) -> None:
        """Push value `index`; `begin` is where this opcode is in the window."""
        self._stack.append(self._recall(index))

    def _recall(self, index: int) -> Any:
        if index >= len(self._memo):
            raise PickleError(f"it refers to value {index} when {len(self._memo)} are known")
        value = self._memo[index]
        if value is UNREAD:
            raise PickleError(f"it refers to value {index}, a part of a record, which no writer does")
        return value

    def _global(self) -> None:
        end = self._data.find(b"\n", self._at, self._at + 1_024)
        last = self._data.find(b"\n", end + 1, end + 1_024) if end >= 0 else -1
        if last < 0:
            raise PickleError("it ends too soon")
        module, name = self._data[self._at : end], self._data[end + 1 : last]
        self._at = last + 1
        self._stack.append(self._find(module.decode("utf-8", "replace"), name.decode("utf-8", "replace")))

    def _stack_global(self) -> None:
        module, name = self._pop(2)
        if type(module) is not str or type(name) is not str:
            raise PickleError("it asks for something without a name")
        self._stack.append(self._find(module, name))

    def _new(self) -> None:
        kind, arguments = self._pop(2)
        if not isinstance(kind, Global) or kind.call is not None or arguments != ():
            raise PickleError("it makes an instance of something that has none")
        self._push_container(Instance(kind))

    def _reduce(self) -> None:
        function, arguments = self._pop(2)
        if not isinstance(function, Global) or function.call is None or not isinstance(arguments, tuple):
            raise PickleError("it calls something that cannot be called")
        self._push_container(function.call(arguments))

    def _build(self) -> None:
        (state,) = self._pop(1)
        instance = self._top(Instance)
        if instance.state is not None or not isinstance(state, dict | tuple):
            raise PickleError("it has a state that does not belong to its object")
        instance.state = state

    def _persistent_id(self) -> None:
        if self._persistent is None:
            raise PickleError("it has a persistent id, which no checkpoint needs")
        (value,) = self._pop(1)
        self._stack.append(self._persistent(value))
