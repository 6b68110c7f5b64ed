"""What a loader needs of a source of examples, whether it lies in memory, in mapped files or behind a network."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from .errors import DataError

if TYPE_CHECKING:
    from .multisource import Mixture

Ref = Any
"""Where an example lies in its source, as JSON-able plain data: an index, or for a stream [file, position]. The refs of
a source can be compared, and `fetch` is called in ascending order, so that a stream is read forward."""

Order = npt.NDArray[np.int64]


class Part(Protocol):
    """One of a fixed number of parts of a source, in the order of an epoch. It is read in the main process."""

    def next(self) -> tuple[Ref, Any] | None:
        """The next example: where it lies, and what `Source.encode` makes samples of; None when the part is used up."""
        ...

    def fetch(self, ref: Ref) -> Any:
        """What `next` gave with this ref, again."""
        ...

    def state_dict(self, pending: Sequence[Ref]) -> dict[str, Any]:
        """The state of a part whose `next` gives the pending examples (those given last, in order) and then the rest.

        JSON-able, and small: positions, never samples.
        """
        ...


class Source(Protocol):
    """Examples of one kind, which can be read in any number of parts.

    A source whose parts are `epoch_order(rows, seed, epoch, n)[number::parts]` says so by an attribute `order_number`
    = n; what was left out of such a source can be told from a run's ledger alone.
    """

    name: str
    rows: int | None  # None where it is not known before all is read

    def part(self, number: int, parts: int, *, seed: int, epoch: int, state: dict[str, Any] | None = None) -> Part:
        """The `number`-th of `parts` parts, which together have every example once, from a state on or the start.

        The order is a function of these arguments alone.
        """
        ...

    def encode(self, raw: Any) -> Any:
        """The sample or list of samples of what `Part.next` gave; runs in a worker process, DataError where broken."""
        ...

    def place(self, ref: Ref) -> str:
        """The file and line, or row, for messages."""
        ...


def sources_of(dataset: Any) -> tuple[list[Source], Mixture | None]:
    """The sources of a dataset and how they are mixed: its own, or it is one itself.

    Raises:
        DataError: it is neither a dataset with `sources`, nor a sequence, nor iterable.
    """
    if hasattr(dataset, "sources"):
        return list(dataset.sources), getattr(dataset, "mixture", None)
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        return [SequenceSource(dataset)], None
    if isinstance(dataset, Iterable):
        return [IterableSource(dataset)], None
    raise DataError(
        f"the dataset, a {type(dataset).__name__}, must have a length and random access, or at least be iterable"
    )


def epoch_order(rows: int, seed: int, epoch: int, number: int = 0) -> Order:
    """The indices of a source in the order of an epoch, int64 [rows]; `number` is its place among several sources."""
    return np.random.default_rng((seed, epoch, number)).permutation(rows)


class IndexedSource:
    """What sources with random access have in common: their indices, shuffled by epoch, in any number of parts.

    Args:
        rows: how many examples there are.
        order_number: the place among several sources, which are shuffled apart.
    """

    def __init__(self, rows: int, order_number: int) -> None:
        self.rows: int | None = rows
        self.order_number = order_number
        self._order: tuple[tuple[int, int], Order] | None = None  # the latest: all parts of an epoch ask for the same

    def part(
        self, number: int, parts: int, *, seed: int, epoch: int, state: dict[str, Any] | None = None
    ) -> SequencePart:
        """One of a number of parts; see `Source.part`."""
        if self._order is None or self._order[0] != (seed, epoch):
            self._order = (seed, epoch), epoch_order(self.rows or 0, seed, epoch, self.order_number)
        return SequencePart(self._order[1][number::parts].copy(), 0 if state is None else state["next"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_order": None}  # which is of no use to a worker


class SequenceSource(IndexedSource):
    """Any object with a length and random access, whose items are samples or lists of samples."""

    name = "data"

    def __init__(self, dataset: Any, *, order_number: int = 0) -> None:
        super().__init__(len(dataset), order_number)
        self.dataset = dataset

    def encode(self, raw: Any) -> Any:
        """The item at an index; its DataError names the index."""
        try:
            return self.dataset[raw]
        except DataError as error:
            raise DataError(f"{self.place(raw)}: {error}", reason=error.reason) from error

    def place(self, ref: Ref) -> str:
        """Which item it is."""
        return f"sample {ref} of the dataset"


class SequencePart:
    """The indices of a part of a sequence."""

    def __init__(self, order: Order, start: int) -> None:
        self._order = order
        self._next = start

    def next(self) -> tuple[Ref, Any] | None:
        """The next example; see `Part.next`."""
        if self._next >= len(self._order):
            return None
        index = int(self._order[self._next])
        self._next += 1
        return index, index

    def fetch(self, ref: Ref) -> Any:
        """What `next` gave with this ref, again."""
        return ref

    def state_dict(self, pending: Sequence[Ref]) -> dict[str, Any]:
        """How many examples were given and are not pending."""
        return {"next": self._next - len(pending)}


class IterableSource:
    """Any iterable of samples or lists of samples. Part v of V is every V-th of its items from the v-th on.

    It is walked in the main process of each rank, which keeps what its parts need and passes over the rest; to resume
    is to walk it again up to where it was. If it has `set_epoch`, that is called before. An iterator can be walked only
    once: for a second epoch, give an object whose `__iter__` begins anew.
    """

    name = "data"
    rows: int | None = None

    def __init__(self, iterable: Iterable[Any]) -> None:
        self._iterable = iterable
        self._walk: _Walk | None = None

    def part(
        self, number: int, parts: int, *, seed: int, epoch: int, state: dict[str, Any] | None = None
    ) -> IterablePart:
        """One of a number of parts; those made before any of them is read share a walk."""
        walk = self._walk
        if walk is None or (walk.epoch, walk.parts) != (epoch, parts) or walk.walked:
            walk = self._walk = _Walk(self._iterable, epoch, parts)
        return IterablePart(walk, number, state)

    def encode(self, raw: Any) -> Any:
        """The item itself."""
        return raw

    def place(self, ref: Ref) -> str:
        """Which item it is."""
        return f"item {ref} of the dataset"

    def __getstate__(self) -> dict[str, Any]:
        return {"_iterable": (), "_walk": None}  # what a worker gets: it does not walk


class _Walk:
    """One pass over an iterable, shared by the parts of a rank."""

    def __init__(self, iterable: Iterable[Any], epoch: int, parts: int) -> None:
        self.epoch = epoch
        self.parts = parts
        self.walked = 0  # items
        self.readers: dict[int, IterablePart] = {}
        self._iterable = iterable
        self._items: Iterator[Any] | None = None

    def advance(self) -> tuple[int, Any] | None:
        """Take the next item, and keep it for the part that is to give it; None at the end."""
        if self._items is None:
            if hasattr(self._iterable, "set_epoch"):
                self._iterable.set_epoch(self.epoch)
            self._items = iter(self._iterable)
        try:
            item = next(self._items)
        except StopIteration:
            return None
        place = self.walked
        self.walked += 1
        reader = self.readers.get(place % self.parts)
        if reader is not None and place // self.parts >= reader.start:
            reader.ready.append((place, item))
        return place, item


class IterablePart:
    """Every V-th item of a walk."""

    def __init__(self, walk: _Walk, number: int, state: dict[str, Any] | None) -> None:
        self.start: int = 0 if state is None else state["next"]  # items of this part before it are not kept
        self.ready: deque[tuple[int, Any]] = deque()
        self._walk = walk
        self._number = number
        self._given = self.start
        walk.readers[number] = self

    def next(self) -> tuple[Ref, Any] | None:
        """The next example; see `Part.next`."""
        while not self.ready:
            if self._walk.advance() is None:
                return None
        self._given += 1
        return self.ready.popleft()

    def fetch(self, ref: Ref) -> Any:
        """What `next` gave with this ref, again: the walk must not have passed it."""
        if not self._given:  # nothing was given by this part: it is here to fetch, and need not keep what is passed
            self._walk.readers.pop(self._number, None)
        while self._walk.walked <= ref:
            found = self._walk.advance()
            if found is None:
                break
            if found[0] == ref:
                return found[1]
        raise DataError(f"item {ref} of the dataset is not there any more", reason="missing file")

    def state_dict(self, pending: Sequence[Ref]) -> dict[str, Any]:
        """How many items were given and are not pending."""
        return {"next": self._given - len(pending)}
