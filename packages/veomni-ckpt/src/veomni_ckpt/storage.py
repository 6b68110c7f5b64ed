"""Where the steps of a run are kept, and how one appears there all at once: by a rename, or by a marker written last.

A disk renames a folder in one act. An object store has no folders and copies to rename, but puts one object at a time
in its place whole: there a step counts from when its manifest is written.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

from veomni_ckpt import manifest
from veomni_ckpt.durable import hidden_beside, naming, publish, remove, restore_replaced, retire
from veomni_ckpt.errors import CheckpointError, DamagedCheckpointError

PROTECTED = "protected"
_STEP = re.compile(r"global_step_(\d+)")
_LEFTOVER = re.compile(r"\.(global_step_\d+)\.(partial|replaced|removed)")


def is_remote(folder: str | Path) -> bool:
    """Whether it is on a file system of fsspec, such as `s3://bucket/run`, and not on this machine."""
    return "://" in str(folder) and not str(folder).startswith("file://")


def as_folder(folder: str | Path) -> Path:
    """The path, or for a URL what behaves like one.

    Raises:
        CheckpointError: a package is missing that the URL needs.
    """
    if isinstance(folder, Path) or "://" not in str(folder):
        return Path(folder)
    if not is_remote(folder):
        return Path(str(folder).removeprefix("file://"))
    try:
        from upath import UPath

        return cast(Path, UPath(folder))
    except ImportError as error:
        raise CheckpointError(f"{folder} needs the package {error.name}: pip install 'veomni-ckpt[fsspec]'") from error


class Storage(Protocol):
    """The step folders of a run. One process at a time changes them."""

    def steps(self) -> list[int]:
        """Those that are complete, in any order."""

    def begin(self, step: int) -> Path:
        """Remove what killed saves have left and make room for the files of a step, under a name that no one reads."""

    def publish(self, draft: Path, step: int, written: manifest.Manifest) -> None:
        """The files in `draft` are complete: they are now the step, in the place of an older one."""

    def discard(self, draft: Path) -> None:
        """Delete what a failed save has left, as far as that is possible; the next `begin` does the rest."""

    def retire(self, step: int) -> None:
        """Delete a step; it is not there any more, before any file of it is gone."""

    def recover(self) -> None:
        """Bring back what a killed run had moved aside; deletes nothing."""


def open_storage(folder: Path) -> Storage:
    """What suits the place."""
    return ObjectStore(folder) if is_remote(folder) else Disk(folder)


class Disk:
    """A folder of a file system that renames in one act and is seen by all ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """Complete is what bears the name."""
        if not self.folder.is_dir():
            return []
        return [step for path in self.folder.iterdir() if (step := _step_of(path)) is not None and path.is_dir()]

    def begin(self, step: int) -> Path:
        """A hidden folder beside the step's."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.recover()
        for path in self._leftovers():
            remove(path)
        draft = hidden_beside(_folder_of(self.folder, step), "partial")
        draft.mkdir()
        return draft

    def publish(self, draft: Path, step: int, written: manifest.Manifest) -> None:
        """Sync every file, then the folder, then rename it."""
        final = _folder_of(self.folder, step)
        with naming(draft / manifest.NAME):
            (draft / manifest.NAME).write_bytes(written.encode())
        if (final / PROTECTED).exists():
            (draft / PROTECTED).touch()
        publish(draft, final)

    def discard(self, draft: Path) -> None:
        """The hidden folder goes."""
        try:
            remove(draft)
        except OSError:
            return

    def retire(self, step: int) -> None:
        """It loses its name first."""
        retire(_folder_of(self.folder, step))

    def recover(self) -> None:
        """A kill between the two renames of a replacement has left the older folder under another name."""
        for path in self._leftovers():
            if match := _LEFTOVER.fullmatch(path.name):
                restore_replaced(self.folder / match[1])

    def _leftovers(self) -> list[Path]:
        paths = list(self.folder.iterdir()) if self.folder.is_dir() else []
        return [path for path in paths if _LEFTOVER.fullmatch(path.name)]


class ObjectStore:
    """A prefix of a store without renames; what is written is seen by all ranks at once, as in S3."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """Complete is what has a manifest."""
        return [step for step, path in self._folders() if (path / manifest.NAME).exists()]

    def begin(self, step: int) -> Path:
        """The step's own folder, or, where there is such a step, one within it that its manifest does not name."""
        for _, path in self._folders():
            self._tidy(path)
        final = _folder_of(self.folder, step)
        draft = final / f"again_{secrets.token_hex(4)}" if (final / manifest.NAME).exists() else final
        draft.mkdir(parents=True, exist_ok=True)
        return draft

    def publish(self, draft: Path, step: int, written: manifest.Manifest) -> None:
        """The manifest is written; what it does not name is deleted."""
        final = _folder_of(self.folder, step)
        below = "" if draft == final else draft.name
        (final / manifest.NAME).write_bytes(replace(written, folder=below).encode())
        try:
            self._tidy(final)
        except Exception:
            return  # the step is complete; the next `begin` tries again

    def discard(self, draft: Path) -> None:
        """All that lies there, which no manifest names."""
        try:
            _remove_tree(draft)
        except Exception:
            return

    def retire(self, step: int) -> None:
        """Its manifest goes first."""
        final = _folder_of(self.folder, step)
        (final / manifest.NAME).unlink()
        _remove_tree(final)

    def recover(self) -> None:
        """Nothing is ever moved."""

    def _folders(self) -> list[tuple[int, Path]]:
        # what other processes have written is not in the listing that was cached
        _file_system(self.folder).invalidate_cache()
        if not self.folder.is_dir():
            return []
        return [(step, path) for path in self.folder.iterdir() if (step := _step_of(path)) is not None]

    def _tidy(self, final: Path) -> None:
        """Delete what the manifest of a step does not name; all of it, if there is none."""
        if not (final / manifest.NAME).exists():
            _remove_tree(final)
            return
        try:
            written = manifest.read(final)
        except DamagedCheckpointError:
            return  # what belongs to it cannot be known, and a new step is not to fail for an old one
        needed = {manifest.NAME, PROTECTED, *([written.folder] if written.folder else written.files)}
        for path in final.iterdir():
            if path.name not in needed:
                _file_system(final).rm(path.path, recursive=True)  # type: ignore[attr-defined]


def _step_of(path: Path) -> int | None:
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else None


def _folder_of(folder: Path, step: int) -> Path:
    return folder / f"global_step_{step}"


def _file_system(folder: Path) -> Any:
    return folder.fs  # type: ignore[attr-defined]


def _remove_tree(folder: Path) -> None:
    system, root = _file_system(folder), folder.path  # type: ignore[attr-defined]
    system.invalidate_cache()
    if system.exists(root):
        system.rm(root, recursive=True)
