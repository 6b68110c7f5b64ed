"""What goes wrong with a checkpoint, in one sentence each."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint cannot be saved, read, or fitted to the model; the message names the file, key or tensor."""

    def __init__(self, message: str) -> None:
        # names in a strange file may hold anything: nothing that a terminal or a log would obey
        super().__init__("".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message))


class DamagedCheckpointError(CheckpointError):
    """The files of a checkpoint are missing, truncated or not what they claim to be; another checkpoint may do."""
