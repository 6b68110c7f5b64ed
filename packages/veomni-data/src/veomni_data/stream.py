"""Files as a stream: parts of equal size without an index, a shuffle buffer, and a state of a few numbers.

All files, in an order of the epoch, are laid end to end by their bytes and cut into equal stretches, one for each part.
Files of lines are cut at bytes (a line belongs to the stretch in which it begins), Parquet and Arrow files at rows in
proportion. A file that cannot be cut (tar, CSV, a JSON array, what is compressed) is read by each part whose stretch it
reaches into, and each takes its share of the samples, spread evenly over the file.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from .errors import DataError
from .files import first_line
from .multisource import Interleaved, Mixture
from .row import Row, rename_columns, transform_row
from .source import Ref, Source

_BUFFER_BYTES = 1 << 24  # of rows that a shuffle buffer holds; where their places suffice it holds those
_BLOCK_ROWS = 64  # read at a time where nothing is shuffled
_KEPT_ROWS = 1 << 16  # so many rows back a part knows where it stood
_GOLDEN = 0x9E3779B97F4A7C15  # multiples of it, modulo 2^64, are spread evenly, and so are those in any interval
_WORD = 1 << 64


class StreamFile(Protocol):
    """What is read from beginning to end, or from a position on."""

    @property
    def cut(self) -> Literal["bytes", "rows"] | None:
        """What a stretch of it is a range of; such a file has `align(byte) -> position`, or `count() -> rows`."""
        ...

    @property
    def seekable(self) -> bool:
        """Whether reading from a position on costs no more than from the start."""
        ...

    def read(self, position: int, end: int | None = None) -> Iterator[tuple[int, Any]]:
        """What there is from a position on and before `end`: the position of each, and what `values` makes a row of."""
        ...

    def values(self, position: int, payload: Any) -> dict[str, Any]:
        """The columns of a row; DataError where it is broken."""
        ...

    def place(self, position: int) -> str:
        """The file and line, row or sample, for messages."""
        ...

    def quick_place(self, position: int, payload: Any) -> str:
        """The same, or the file and byte where that would have to be looked for."""
        ...


class Stretch(NamedTuple):
    """A range of the bytes of a file."""

    file: int
    begin: int
    end: int


class _Cursor(NamedTuple):
    """Before which sample a part stands."""

    stretch: int
    position: int  # -1: at the beginning of the stretch
    ordinal: int  # samples of the file before it
    again: int  # 1: the sample at this position was given, and behind it the file is broken


class StreamSource:
    """Files of one kind of examples, read in any number of parts.

    Args:
        files: as streams.
        names, folders, sizes: of the files; a size of None counts as the mean of those that are known.
        name: of the source.
        transform: makes of a row what `encode` gives.
        shuffle_buffer: so many rows, or 16 MB of them, are read at a time and given in a random order, and files are
            read in a random order; 0 = everything in the order of the files.
        columns, root, label: see `Row` and `rename_columns`.
    """

    rows: int | None = None

    def __init__(
        self,
        files: Sequence[StreamFile],
        *,
        names: Sequence[str],
        folders: Sequence[Path | None],
        sizes: Sequence[int | None],
        name: str,
        transform: Callable[[Row], Any] | None = None,
        shuffle_buffer: int = 256,
        columns: Mapping[str, str] | None = None,
        root: Path | None = None,
        label: str | None = None,
    ) -> None:
        self.name = name
        self.transform = transform
        self.shuffle_buffer = shuffle_buffer
        self.files = list(files)
        self._names = list(names)
        self._folders = list(folders)
        known = [size for size in sizes if size is not None]
        mean = sum(known) // len(known) if known else 1 << 20
        self.sizes = [mean if size is None else size for size in sizes]
        self._columns = columns
        self._root = root
        self._label = label

    def part(
        self, number: int, parts: int, *, seed: int, epoch: int, state: dict[str, Any] | None = None
    ) -> StreamPart:
        """One of a number of parts; see `Source.part`."""
        return StreamPart(self, number, parts, seed=seed, epoch=epoch, state=state)

    def encode(self, raw: Any) -> Any:
        """What the transform makes of a row, or the row; DataError, with file and line, where it is broken."""
        number, position, payload = raw
        if isinstance(payload, DataError):
            raise payload
        file = self.files[number]
        try:
            values = file.values(position, payload)
            if self._columns is not None:
                values = rename_columns(values, self._columns)
        except DataError as error:
            raise DataError(f"{file.place(position)}: {error}", reason=error.reason) from error
        place = file.quick_place(position, payload)
        row = Row(values, place, self._folders[number], self._label, self._root)
        return row if self.transform is None else transform_row(self.transform, row, lambda: file.place(position))

    def place(self, ref: Ref) -> str:
        """The file and line, row or sample."""
        number, position = ref
        return self.files[number].place(position)

    def stretches(self, number: int, parts: int, *, seed: int, epoch: int) -> list[Stretch]:
        """What a part is made of: about 1 of `parts` equal parts of all bytes."""
        order: Sequence[int] = range(len(self.files))
        if self.shuffle_buffer:
            order = np.random.default_rng((seed, epoch)).permutation(len(self.files)).tolist()
        total = sum(self.sizes)
        first, last = number * total // parts, (number + 1) * total // parts
        found, at = [], 0
        for file in order:
            begin, end = max(at, first), min(at + self.sizes[file], last)
            if begin < end:
                found.append(Stretch(file, begin - at, end - at))
            at += self.sizes[file]
        return found

    def broken(self, number: int, error: Exception) -> DataError:
        """That a file cannot be read (on), as an error that names it."""
        name = self._names[number]
        reason = error.reason if isinstance(error, DataError) else "bad row"
        if isinstance(error, FileNotFoundError):
            return DataError(f"{name} is not there any more", reason="missing file")
        message = first_line(error) if name in first_line(error) else f"{name}: {first_line(error)}"
        return DataError(f"{message}; the rest of this file is left out", reason=reason)


class StreamPart:
    """One of the parts of a stream: blocks of examples, each in a random order of its own."""

    def __init__(
        self, source: StreamSource, number: int, parts: int, *, seed: int, epoch: int, state: dict[str, Any] | None
    ) -> None:
        self._source = source
        self._key = (seed, epoch, number)
        self._stretches = source.stretches(number, parts, seed=seed, epoch=epoch)
        self._block_rows = source.shuffle_buffer or _BLOCK_ROWS
        self._begin = _Cursor(0, -1, 0, 0) if state is None else _Cursor(*state["at"])  # of the block
        self._given = 0  # of the block
        self._block: list[tuple[Ref, Any]] = []
        self._passed: deque[tuple[_Cursor, int]] = deque()  # earlier blocks: where they begin, and how many they gave
        self._passed_rows = 0
        self._incoming = self._read(self._begin)
        self._fetched: tuple[int, int, Any, Iterator[tuple[int, Any]]] | None = None
        if state is not None and state["given"]:
            self._next_block()
            self._given = state["given"]

    def next(self) -> tuple[Ref, Any] | None:
        """The next example; see `Part.next`."""
        if self._given >= len(self._block) and not self._next_block():
            return None
        self._given += 1
        return self._block[self._given - 1]

    def fetch(self, ref: Ref) -> Any:
        """What `next` gave with this ref, again."""
        number, position = ref
        try:
            payload = self._find(number, position)
        except Exception as error:  # each format and file system has errors of its own
            payload = self._source.broken(number, error)
        return number, position, payload

    def state_dict(self, pending: Sequence[Ref]) -> dict[str, Any]:
        """Where the part stood before the pending examples were given: the begin of a block, and how many of it."""
        begin, given, missing = self._begin, self._given, len(pending)
        for earlier, rows in reversed(self._passed):
            if missing <= given:
                break
            missing -= given
            begin, given = earlier, rows
        if missing > given:
            raise ValueError(f"{len(pending)} examples are pending, more than a part can go back")
        return {"at": list(begin), "given": given - missing}

    def _next_block(self) -> bool:
        """Read the next block; whether there is one."""
        block: list[tuple[Ref, Any]] = []
        size = 0
        begin = self._begin
        while len(block) < self._block_rows and size < _BUFFER_BYTES:
            found = next(self._incoming, None)
            if found is None:
                break
            cursor, ref, payload = found
            if not block:
                begin = cursor
            block.append((ref, (*ref, payload)))
            size += _size(payload)
        if not block:
            return False
        if self._block:
            self._passed.append((self._begin, len(self._block)))
            self._passed_rows += len(self._block)
            while self._passed_rows - self._passed[0][1] > _KEPT_ROWS:
                self._passed_rows -= self._passed.popleft()[1]
        if self._source.shuffle_buffer:
            order = np.random.default_rng((*self._key, *(n + 1 for n in begin))).permutation(len(block))
            block = [block[i] for i in order]
        self._begin, self._block, self._given = begin, block, 0
        return True

    def _read(self, start: _Cursor) -> Iterator[tuple[_Cursor, Ref, Any]]:
        """The examples of the stretches from a cursor on; where a file cannot be read on, a DataError for its rest."""
        for number in range(start.stretch, len(self._stretches)):
            stretch = self._stretches[number]
            cursor = start if number == start.stretch else _Cursor(number, -1, 0, 0)
            try:
                for position, ordinal, payload in self._read_stretch(stretch, cursor):
                    cursor = _Cursor(number, position, ordinal, 0)
                    yield cursor, [stretch.file, position], payload
                    cursor = cursor._replace(again=1)
            except Exception as error:  # each format and file system has errors of its own
                ref = [stretch.file, max(cursor.position, 0)]
                yield cursor, ref, self._source.broken(stretch.file, error)

    def _read_stretch(self, stretch: Stretch, cursor: _Cursor) -> Iterator[tuple[int, int, Any]]:
        """The position, number in the file, and payload of each example of a stretch from a cursor on."""
        file: Any = self._source.files[stretch.file]
        size = self._source.sizes[stretch.file]
        begin, end = 0, None
        if file.cut == "bytes":
            begin, end = file.align(stretch.begin), stretch.end
        elif file.cut == "rows":
            rows = file.count()
            begin, end = rows * stretch.begin // size, rows * stretch.end // size
        ordinal = cursor.ordinal
        for position, payload in file.read(begin if cursor.position < 0 else cursor.position, end):
            share = stretch.begin <= (ordinal * _GOLDEN % _WORD) * size // _WORD < stretch.end
            if (file.cut is not None or share) and not (cursor.again and position == cursor.position):
                yield position, ordinal, payload
            ordinal += 1

    def _find(self, number: int, position: int) -> Any:
        file = self._source.files[number]
        if self._fetched is not None and self._fetched[0] == number:
            _, at, payload, ahead = self._fetched
            if at == position:
                return payload
            if file.seekable or position < at:
                ahead = file.read(position)
        else:
            ahead = file.read(position)
        at, payload = next((found for found in ahead if found[0] >= position), (-1, None))
        if at != position:
            raise DataError("it is not what it was", reason="missing file")
        self._fetched = (number, at, payload, ahead)
        return payload


class StreamingDataset(IterableDataset[Any]):
    """The rows of files as a stream, each passed through the transform. Made by `build_dataset(kind="iterable")`.

    Iterating it alone, or in the workers of torch's DataLoader, which share it, gives an epoch, and nothing is read
    before. The order is a function of the seed and the epoch, and of how many share it. `state_dict` is where its
    latest iteration stands. An iteration goes on behind a row that raised a DataError.
    """

    def __init__(self, sources: Sequence[Source], mixture: Mixture | None = None, *, seed: int = 0) -> None:
        self.sources = list(sources)
        self.mixture = mixture
        self.seed = seed
        self.epoch = 0
        self._rank = 0
        self._ranks = 1
        self._state: dict[str, Any] | None = None  # where the next iteration goes on
        self._iteration: Interleaved | None = None
        self._part = (0, 1)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        self._part = (self._rank * workers + number, self._ranks * workers)
        state, self._state = self._state, None
        if state is not None and tuple(state["part"]) != self._part:
            raise DataError(
                f"the state is that of part {state['part'][0]} of {state['part'][1]} of the stream, "
                f"but part {self._part[0]} of {self._part[1]} is to go on from it"
            )
        self._iteration = Interleaved(
            self.sources,
            self.mixture,
            number=self._part[0],
            parts=self._part[1],
            seed=self.seed,
            epoch=self.epoch,
            state=state and state["iteration"],
        )
        return self._iteration

    def shard(self, rank: int, size: int) -> StreamingDataset:
        """The part of one of `size` machines or ranks; their parts have every row once."""
        if not 0 <= rank < size:
            raise DataError(f"rank={rank} is not one of size={size} ranks")
        shard = StreamingDataset(self.sources, self.mixture, seed=self.seed)
        shard.epoch = self.epoch
        shard._rank, shard._ranks = self._rank * size + rank, self._ranks * size
        return shard

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be this epoch, from its beginning, unless a loaded state goes on within it."""
        if epoch != self.epoch:
            self._state = self._iteration = None
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Where the latest iteration stands: a few plain values, JSON-able."""
        iteration = self._state and self._state["iteration"]
        if self._iteration is not None and self._state is None:
            iteration = self._iteration.state_dict()
        return {"epoch": self.epoch, "seed": self.seed, "part": list(self._part), "iteration": iteration}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration go on where another stood.

        Raises:
            DataError: it is a state of another seed, or of another number of sources.
        """
        if state["seed"] != self.seed:
            raise DataError(f"the stream was saved with seed={state['seed']} but is loaded with seed={self.seed}")
        self.epoch, self._iteration, self._state = state["epoch"], None, None
        if state["iteration"] is not None:
            saved = len(state["iteration"]["sources"])
            if saved != len(self.sources):
                raise DataError(f"the stream was saved with {saved} sources but is loaded with {len(self.sources)}")
            self._state, self._part = dict(state), (state["part"][0], state["part"][1])


def _size(payload: Any) -> int:
    """About how many bytes a row holds."""
    if isinstance(payload, (bytes, str)):
        return len(payload) + 40
    if isinstance(payload, Mapping):
        return sum(_size(value) for value in payload.values()) + 60
    if isinstance(payload, (list, tuple)):
        return sum(_size(value) for value in payload) + 60
    return getattr(payload, "nbytes", 0) + 30
