"""Checkpoints that survive a kill, and Hugging Face folders in and out of sharded models."""

from veomni_ckpt.errors import CheckpointError
from veomni_ckpt.hf_export import export_hf
from veomni_ckpt.hf_pretrained import load_pretrained
from veomni_ckpt.manager import CheckpointManager

__all__ = ["CheckpointError", "CheckpointManager", "export_hf", "load_pretrained"]
