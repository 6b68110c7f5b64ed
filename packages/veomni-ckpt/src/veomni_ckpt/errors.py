"""What goes wrong with a checkpoint, in one sentence each."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint cannot be saved, read, or fitted to the model; the message names the file, key or tensor."""


class DamagedCheckpointError(CheckpointError):
    """The files of a checkpoint are missing, truncated or not what they claim to be; another checkpoint may do."""
