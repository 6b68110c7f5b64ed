"""A folder that is written under a hidden name, goes on after a kill, and appears when it is complete."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from veomni_ckpt.durable import hidden_beside, publish, remove
from veomni_ckpt.errors import CheckpointError

JOURNAL = "conversion.json"


@dataclass
class ResumableFolder:
    """A folder in the making.

    Attributes:
        path: where to write.
        final: the name that it will get.
        finished: names of files that this call, or an earlier one that was killed, has finished.
    """

    path: Path
    final: Path
    finished: set[str]
    fingerprint: str

    def finish(self, name: str) -> None:
        """Note that a file is complete."""
        self.finished.add(name)
        self.note()

    def note(self) -> None:
        """Write down what is finished."""
        new = self.path / (JOURNAL + ".new")
        new.write_text(json.dumps({"fingerprint": self.fingerprint, "finished": sorted(self.finished)}), "utf-8")
        new.replace(self.path / JOURNAL)

    def publish(self, *, sync: bool) -> None:
        """Give the folder its name; an older one of that name is replaced. `sync`: when all of it is on the disk."""
        (self.path / JOURNAL).unlink(missing_ok=True)
        if self.final.is_dir() and not any(self.final.iterdir()):
            self.final.rmdir()
        if sync:
            publish(self.path, self.final)
            return
        replaced = hidden_beside(self.final, "replaced")
        if self.final.exists():
            remove(replaced)
            self.final.rename(replaced)
        self.path.rename(self.final)
        remove(replaced)


@contextmanager
def resumable_folder(final: Path, fingerprint: str) -> Iterator[ResumableFolder]:
    """The folder to write into, locked; deleted if an error comes, but not by a kill or an interrupt.

    Args:
        final: the name that it will get.
        fingerprint: what an earlier call wrote is of use only if its fingerprint was the same.

    Raises:
        CheckpointError: another process is writing it.
    """
    path = hidden_beside(final, "partial")
    path.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(f"another conversion is writing {final}") from error
        try:
            finished = _finished(path, fingerprint)
            if not finished:
                for left in path.iterdir():
                    remove(left) if left.is_dir() else left.unlink()
            folder = ResumableFolder(path, final, finished, fingerprint)
            folder.note()
            yield folder
        except Exception:
            remove(path)
            raise
    finally:
        os.close(lock)


def _finished(path: Path, fingerprint: str) -> set[str]:
    try:
        journal = json.loads((path / JOURNAL).read_text("utf-8"))
        return set(journal["finished"]) if journal["fingerprint"] == fingerprint else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()
