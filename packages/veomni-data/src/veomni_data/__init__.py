"""Samples to tokens to packed micro-batches, exactly once on any number of machines."""

from __future__ import annotations

from .audit import AuditReport, audit
from .balance import BalancedBuffer, Outlook, Target, attention_cost, deal_rows, step_target
from .buckets import BucketBuffer
from .chat_template import TEMPLATES, ChatTemplate, get_chat_template, register_chat_template
from .collators import Batch, PackingCollator, PaddingCollator, Sample
from .dataset import MappingDataset, Row, build_dataset
from .errors import DataError
from .files import resolve_path
from .layouts import normalize_example
from .ledger import Ledger, read_ledger
from .lengths import fit_sample
from .loader import build_dataloader
from .multimodal import encode_multimodal_sample, multimodal_prompt
from .multisource import Mixture
from .packing import PackingBuffer, pack
from .pictures import load_picture
from .pipeline import DataDescription, Pipeline, build_pipeline
from .placeholders import Generation
from .preference import process_preference_example
from .prepare import prepare
from .replay import replay
from .sequence_parallel import slice_for_sequence_parallel
from .sound import load_sound
from .source import IterableSource, Part, SequenceSource, Source
from .steps import DataLoader
from .stream import StreamingDataset
from .text import process_pretrain_example, process_sft_example
from .video import Video, load_video

__all__ = [
    "TEMPLATES",
    "AuditReport",
    "BalancedBuffer",
    "Batch",
    "BucketBuffer",
    "ChatTemplate",
    "DataDescription",
    "DataError",
    "DataLoader",
    "Generation",
    "IterableSource",
    "Ledger",
    "MappingDataset",
    "Mixture",
    "Outlook",
    "PackingBuffer",
    "PackingCollator",
    "PaddingCollator",
    "Part",
    "Pipeline",
    "Row",
    "Sample",
    "SequenceSource",
    "Source",
    "StreamingDataset",
    "Target",
    "Video",
    "attention_cost",
    "audit",
    "build_dataloader",
    "build_dataset",
    "build_pipeline",
    "deal_rows",
    "encode_multimodal_sample",
    "fit_sample",
    "get_chat_template",
    "load_picture",
    "load_sound",
    "load_video",
    "multimodal_prompt",
    "normalize_example",
    "pack",
    "prepare",
    "process_preference_example",
    "process_pretrain_example",
    "process_sft_example",
    "read_ledger",
    "register_chat_template",
    "replay",
    "resolve_path",
    "slice_for_sequence_parallel",
    "step_target",
]
