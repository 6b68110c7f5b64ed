"""What belongs to a checkpoint: the names, lengths and checksums of its files, in a file that is written last.

In the files of the tensors every item has checksums of its own: the zip archives that torch.save writes hold a CRC-32
of each member, and so a rank checks exactly the items that it reads. Of these files the manifest knows the end, which
holds the last item's checksum: a file of another save has another one.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from veomni_ckpt.errors import DamagedCheckpointError

NAME = "manifest.json"
_TENSORS = ".distcp"
_END = 1024
_FOLDER = re.compile(r"|again_[0-9a-f]{8}")


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint.

    Attributes:
        files: name -> (length in bytes, CRC-32 of the content; of the last 1,024 bytes of a `.distcp` file).
        folder: where they are below the step's folder; empty for there.
        trainable_only: frozen parameters were left out.
    """

    files: dict[str, tuple[int, int]]
    folder: str = ""
    trainable_only: bool = False

    def encode(self) -> bytes:
        """As JSON, which `read` reads."""
        files = {name: {"bytes": size, "crc32": crc} for name, (size, crc) in sorted(self.files.items())}
        document = {"format": 1, "folder": self.folder, "trainable_only": self.trainable_only, "files": files}
        return (json.dumps(document, indent=1) + "\n").encode()

    def check_files(self, folder: Path) -> None:
        """Hold the lengths of all files, and the ends of the tensors' files, against those in `folder`.

        Raises:
            DamagedCheckpointError: naming the file that is missing, of another length, or of another save.
        """
        found = sizes(folder)
        for name, (size, crc) in self.files.items():
            if name not in found:
                raise DamagedCheckpointError(f"{folder / name} is missing")
            if found[name] != size:
                what = "is truncated" if found[name] < size else "is too long"
                raise DamagedCheckpointError(f"{folder / name} {what}: {found[name]} bytes of {size}")
            if name.endswith(_TENSORS) and _crc_of_end(folder / name, size) != crc:
                raise DamagedCheckpointError(f"{folder / name} is damaged: its end is not what was saved")

    def content(self, folder: Path, name: str) -> bytes:
        """All bytes of a file that is not of the tensors.

        Raises:
            DamagedCheckpointError: they are not those that were saved.
        """
        if name not in self.files:
            raise DamagedCheckpointError(f"{folder / NAME} does not list {name}")
        size, crc = self.files[name]
        try:
            data = (folder / name).read_bytes()
        except FileNotFoundError as error:
            raise DamagedCheckpointError(f"{folder / name} is missing") from error
        except OSError as error:
            raise DamagedCheckpointError(f"{folder / name} cannot be read ({error})") from error
        if len(data) < size:
            raise DamagedCheckpointError(f"{folder / name} is truncated: {len(data)} bytes of {size}")
        if zlib.crc32(data) != crc:
            raise DamagedCheckpointError(f"{folder / name} is damaged: its bytes are not those that were saved")
        return data


def sizes(folder: Path) -> dict[str, int]:
    """The length of each file in a folder, in bytes."""
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}


def of_files(folder: Path, trainable_only: bool) -> Manifest:
    """List the files of a folder as they are now; reads all but those of the tensors."""
    files = {}
    for name, size in sizes(folder).items():
        path = folder / name
        files[name] = (size, _crc_of_end(path, size) if name.endswith(_TENSORS) else zlib.crc32(path.read_bytes()))
    return Manifest(files, trainable_only=trainable_only)


def _crc_of_end(path: Path, size: int) -> int:
    with path.open("rb") as stream:
        stream.seek(max(0, size - _END))
        return zlib.crc32(stream.read(_END))


def read(step_folder: Path) -> Manifest:
    """The manifest of a step folder.

    Raises:
        DamagedCheckpointError: it is missing, or not of this form.
    """
    path = step_folder / NAME
    try:
        document = json.loads(path.read_bytes())
        if document["format"] != 1 or not _FOLDER.fullmatch(document["folder"]):
            raise ValueError("it is of another format")
        files = {}
        for name, entry in document["files"].items():
            size, crc = entry["bytes"], entry["crc32"]
            if type(size) is not int or type(crc) is not int:
                raise ValueError(f"{name} has no length or no checksum")
            files[name] = (size, crc)
        return Manifest(files, document["folder"], document["trainable_only"] is True)
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{path} is missing: it is not a whole checkpoint of CheckpointManager") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({error})") from error


def fault_of_item(item: IO[bytes]) -> str | None:
    """Why an item of a `.distcp` file, an archive of torch.save, is not what was saved; None if it is."""
    try:
        with zipfile.ZipFile(item) as archive:
            spoilt = archive.testzip()
    except Exception as error:  # spoilt headers make the archive's reader fail in many ways
        return f"its archive cannot be read ({error})"
    return None if spoilt is None else "its bytes are not those that were saved"
