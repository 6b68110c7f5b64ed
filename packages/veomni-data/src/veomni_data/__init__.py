"""Samples to tokens to packed micro-batches, exactly once on any number of machines."""

from __future__ import annotations

from .chat_template import TEMPLATES, ChatTemplate, get_chat_template, register_chat_template
from .collators import Batch, PackingCollator, PaddingCollator, Sample
from .dataset import MappingDataset, Row, build_dataset
from .errors import DataError
from .loader import DataLoader, build_dataloader
from .multimodal import encode_multimodal_sample, multimodal_prompt
from .packing import PackingBuffer, pack
from .pictures import load_picture
from .sequence_parallel import slice_for_sequence_parallel
from .text import process_pretrain_example, process_sft_example

__all__ = [
    "TEMPLATES",
    "Batch",
    "ChatTemplate",
    "DataError",
    "DataLoader",
    "MappingDataset",
    "PackingBuffer",
    "PackingCollator",
    "PaddingCollator",
    "Row",
    "Sample",
    "build_dataloader",
    "build_dataset",
    "encode_multimodal_sample",
    "get_chat_template",
    "load_picture",
    "multimodal_prompt",
    "pack",
    "process_pretrain_example",
    "process_sft_example",
    "register_chat_template",
    "slice_for_sequence_parallel",
]
