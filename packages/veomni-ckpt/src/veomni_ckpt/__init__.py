"""Checkpoints that survive a kill, and Hugging Face folders in and out of them, with torch or without."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from veomni_ckpt.errors import CheckpointError

if TYPE_CHECKING:
    from veomni_ckpt.hf_export import export_hf
    from veomni_ckpt.hf_pretrained import LoadReport, load_pretrained
    from veomni_ckpt.inspection import Inspection, inspect
    from veomni_ckpt.leftovers import Leftover, find_leftovers, prune, repair
    from veomni_ckpt.manager import CheckpointManager
    from veomni_ckpt.preemption import StopSignals
    from veomni_ckpt.to_dcp import hf_to_dcp
    from veomni_ckpt.to_hf import Conversion, dcp_to_hf
    from veomni_ckpt.verification import Verification, verify

# imported when they are used: what needs torch must not slow down, or hinder, what does not
_MODULES = {
    "CheckpointManager": "manager",
    "Conversion": "to_hf",
    "Inspection": "inspection",
    "Leftover": "leftovers",
    "LoadReport": "hf_pretrained",
    "StopSignals": "preemption",
    "Verification": "verification",
    "dcp_to_hf": "to_hf",
    "export_hf": "hf_export",
    "find_leftovers": "leftovers",
    "hf_to_dcp": "to_dcp",
    "inspect": "inspection",
    "load_pretrained": "hf_pretrained",
    "prune": "leftovers",
    "repair": "leftovers",
    "verify": "verification",
}

__all__ = [
    "CheckpointError",
    "CheckpointManager",
    "Conversion",
    "Inspection",
    "Leftover",
    "LoadReport",
    "StopSignals",
    "Verification",
    "dcp_to_hf",
    "export_hf",
    "find_leftovers",
    "hf_to_dcp",
    "inspect",
    "load_pretrained",
    "prune",
    "repair",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
