"""Feeds the shards of a rank: what they ask for is encoded, in worker processes or here, and handed to them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from .encoding import Encoder, Request
from .shards import Ask, VirtualShard
from .workers import CHUNK, Workers


class _Ticket(NamedTuple):
    ask: Ask
    epoch: list[VirtualShard]  # the shards of the iteration that asked: after the next has begun it is not waited for
    encoder: Encoder

    @property
    def place(self) -> str:
        request = self.ask.request
        return self.encoder.sources[request.source].place(request.ref)


class Feeder:
    """Encodes the requests of shards.

    Which shard is fed first has no influence on the batches: each has its own fixed order.

    Args:
        encoder: what makes samples.
        num_workers: processes; 0 = here, when a shard waits for it.
        prefetch_factor: lots of 8 examples that each worker is ahead at least.
        worker_init, timeout, seed: see `Workers`.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        num_workers: int,
        prefetch_factor: int,
        worker_init: Callable[[int], None] | None,
        timeout: float | None,
        seed: int,
    ) -> None:
        self._encoder = encoder
        self._count = num_workers
        self._least_ahead = num_workers * prefetch_factor * CHUNK
        self._ahead = self._least_ahead  # examples that are being encoded, and that are here beside buffers, at most
        self._arrived = [1, 1]  # examples and samples
        self._start = lambda: Workers(encoder, num_workers, init=worker_init, timeout=timeout, seed=seed)
        self._workers: Workers | None = None
        self._shards: list[VirtualShard] = []
        self._held: Iterator[Ask] = iter(())
        self._seen = 0
        self._error: Exception | None = None  # to be raised when something is waited for

    def begin(self, shards: list[VirtualShard]) -> None:
        """What these shards ask for is wanted from now on, and what others asked for no more."""
        self._shards, self._error = shards, None
        self._held = _held_back(shards)
        self._seen = sum(shard.counts.seen for shard in shards)

    def wait(self, shard: VirtualShard) -> None:
        """Wait until something has arrived; before long that is what this shard waits for.

        Raises:
            DataError: a worker has died.
            Exception: what encoding raised.
        """
        if self._error is not None:
            raise self._error
        if not self._count:
            ask = next(self._held, None) or shard.ask()
            assert ask is not None
            ask.shard.arrive(ask, self._encoder(ask.request))
            return
        if self._workers is None:
            self._workers = self._start()
        self._send(shard)
        try:
            arrived = self._workers.receive()
        except BaseException:
            self.close()
            raise
        for ticket, example in arrived:
            self._arrived = [self._arrived[0] + 1, self._arrived[1] + len(example.samples)]
            if ticket.epoch is self._shards:
                ticket.ask.shard.arrive(ticket.ask, example)

    def end_step(self, samples: int) -> None:
        """A step of so many samples is made: let the workers go on with the next, which needs about as much."""
        seen = sum(shard.counts.seen for shard in self._shards)
        # at first much is seen to fill the buffers; an example may also be many samples
        self._ahead, self._seen = max(self._least_ahead, min(samples, seen - self._seen)), seen
        if self._workers is not None:
            try:
                self._send(None)
            except Exception as error:  # it is of a step to come
                self._error = error

    def close(self) -> None:
        """End the workers; they are started anew when they are needed."""
        if self._workers is not None:
            self._workers.close()
        self._workers = None

    def _send(self, wanted: VirtualShard | None) -> None:
        assert self._workers is not None
        asks = self._asks(wanted)
        while chunk := list(islice(asks, CHUNK)):
            self._workers.send([(_Ticket(ask, self._shards, self._encoder), ask.request) for ask in chunk])

    def _asks(self, wanted: VirtualShard | None) -> Iterator[Ask]:
        """What is to be sent now: what a shard waits for, and as much ahead as there may be."""
        assert self._workers is not None
        if any(shard.to_refill for shard in self._shards):  # only then are the parts read on
            yield from islice(self._held, max(0, self._least_ahead - self._workers.sent))
            return
        while wanted is not None and wanted.urgent:
            yield wanted.urgent.popleft()
        # the buffers, and beside them what is ahead; of whole chunks, as a message costs as much as several examples
        pieces = max(1.0, self._arrived[1] / self._arrived[0])
        room = self._ahead + sum(shard.to_fill - shard.unused * pieces for shard in self._shards)
        room = min(int(room / pieces), self._ahead - self._workers.sent) // CHUNK * CHUNK
        neediest = [(shard.ahead, shard.number, shard) for shard in self._shards] if room > 0 else []
        heapq.heapify(neediest)
        while room > 0 and neediest:
            ahead, number, shard = neediest[0]
            ask = shard.ask()
            if ask is None:
                heapq.heappop(neediest)
            else:
                heapq.heapreplace(neediest, (ahead + 1, number, shard))
                yield ask
                room -= 1


def _held_back(shards: Sequence[VirtualShard]) -> Iterator[Ask]:
    """What the shards held back when their state was saved, of each source in ascending order."""
    held = [(source, passes, ref, shard) for shard in shards for source, passes, ref in shard.held_back()]
    held.sort(key=lambda each: each[:3])
    parts = {(source, passes, shard): None for source, passes, _, shard in held}
    opened = {key: key[2].fetcher(key[0], key[1]) for key in parts}
    for source, passes, ref, shard in held:
        raw = opened[source, passes, shard].fetch(ref)
        yield Ask(shard, Request(source, ref, raw), -1, passes)
