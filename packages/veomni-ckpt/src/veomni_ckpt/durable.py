"""Folders that appear under their name only when every byte of them is on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError that names no file, as when a write finds the disk full, is raised again with the name `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def hidden_beside(final: Path, kind: str) -> Path:
    """The hidden working name beside `final`; `kind` is "partial", "replaced" or "removed"."""
    return final.with_name(f".{final.name}.{kind}")


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(partial: Path, final: Path) -> None:
    """Sync all files of `partial`, then its folders, and rename it to `final`; an older `final` is replaced.

    A kill between the two renames of a replacement leaves the older folder as `.NAME.replaced`:
    `restore_replaced` brings it back.
    """
    folders = [partial]
    for path in partial.rglob("*"):
        if path.is_dir():
            folders.append(path)
        else:
            sync(path)
    for folder in reversed(folders):
        sync(folder)
    replaced = hidden_beside(final, "replaced")
    if final.exists():
        remove(replaced)
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    remove(replaced)


def restore_replaced(final: Path) -> None:
    """Bring back a folder that was moved aside by a `publish` that did not live to put the new one in its place."""
    replaced = hidden_beside(final, "replaced")
    if replaced.is_dir() and not final.exists():
        replaced.rename(final)


def remove(folder: Path) -> None:
    """Delete a folder and all in it, if it is there."""
    if folder.is_dir():
        shutil.rmtree(folder)


def retire(final: Path) -> None:
    """Delete a published folder; it loses its name first, so that what bears the name is complete to the last."""
    removed = hidden_beside(final, "removed")
    remove(removed)
    final.rename(removed)
    remove(removed)
