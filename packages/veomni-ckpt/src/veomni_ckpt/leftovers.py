"""Hidden folders that a killed save or conversion left beside what it was about to write."""

from __future__ import annotations

import fcntl
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from veomni_ckpt.durable import remove
from veomni_ckpt.errors import CheckpointError

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|replaced|removed)")
_STEP = re.compile(r"global_step_\d+")
_QUIET_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Leftover:
    """A folder that was left unfinished.

    Attributes:
        path: the hidden folder.
        final: the name that it had or was to get.
        kind: "partial" (not whole), "replaced" (an older one, moved aside), "removed" (half deleted).
        nbytes: what its files take.
        in_use: somebody is writing it, or has within the last ten minutes.
    """

    path: Path
    final: Path
    kind: str
    nbytes: int
    in_use: bool

    @property
    def is_needed(self) -> bool:
        """Whether it is the only whole copy: `repair` gives it its name back."""
        return self.kind == "replaced" and not self.final.exists()


def find_leftovers(folder: str | Path) -> list[Leftover]:
    """The unfinished leftovers of saves and conversions in a folder; only of those that this package makes.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    folder = Path(folder)
    try:
        found = [_look(path) for path in sorted(folder.iterdir())]
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read ({error.strerror})") from error
    return [leftover for leftover in found if leftover is not None]


def repair(folder: str | Path) -> list[Leftover]:
    """Give back its name to what was moved aside by a replacement that did not live to its end; returns those.

    Raises:
        CheckpointError: the folder cannot be read, or a rename fails.
    """
    return [_act(leftover, restore=True) for leftover in find_leftovers(folder) if leftover.is_needed]


def prune(folder: str | Path, *, dry_run: bool = False) -> list[Leftover]:
    """Delete unfinished leftovers, but for those that are in use or the only whole copy; returns those.

    Args:
        folder: holds checkpoints or Hugging Face folders.
        dry_run: delete nothing.

    Raises:
        CheckpointError: the folder cannot be read, or one cannot be deleted.
    """
    chosen = [leftover for leftover in find_leftovers(folder) if not leftover.in_use and not leftover.is_needed]
    return chosen if dry_run else [_act(leftover, restore=False) for leftover in chosen]


def _act(leftover: Leftover, *, restore: bool) -> Leftover:
    try:
        if restore:
            leftover.path.rename(leftover.final)
        else:
            remove(leftover.path)
    except OSError as error:
        raise CheckpointError(f"{leftover.path} cannot be moved or deleted ({error.strerror})") from error
    return leftover


def _look(path: Path) -> Leftover | None:
    match = _LEFTOVER.fullmatch(path.name)
    if match is None or path.is_symlink() or not path.is_dir():
        return None
    files = [Path(root) / name for root, _, names in os.walk(path) for name in names]
    names = {file.name for file in files}
    # hidden folders of others may have such names too: ours hold what we write, or nothing yet
    is_ours = (
        _STEP.fullmatch(match["name"])
        or not names
        or any(
            name in (".metadata", "config.json", "conversion.json") or name.endswith((".safetensors", ".distcp"))
            for name in names
        )
    )
    if not is_ours:
        return None
    stats = [file.stat() for file in files if file.is_file()]
    newest = max([path.stat().st_mtime, *(stat.st_mtime for stat in stats)])
    in_use = match["kind"] == "partial" and (
        _is_locked(path) or (time.time() - newest < _QUIET_SECONDS and not _resumable(names))
    )
    size = sum(stat.st_size for stat in stats)
    return Leftover(path, path.with_name(match["name"]), match["kind"], size, in_use)


def _resumable(names: set[str]) -> bool:
    """Whether it is a conversion's, whose lock says whether it is alive: its age is not needed."""
    return "conversion.json" in names


def _is_locked(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
