"""Foundation models of the ecosystem, and omni models assembled from any parts."""

from veomni_models.adapters import (
    add_adapters,
    has_adapters,
    initialize_adapters,
    merge_adapters,
    save_adapters,
    without_adapters,
)
from veomni_models.auto import register_omni_model
from veomni_models.decoders import build_picture_decoder, register_decoder
from veomni_models.distillation import Distillation, fused_linear_distillation
from veomni_models.drawing import DrawingOptions, Reply, drawing_options, reply
from veomni_models.errors import ModelError
from veomni_models.flops import flops_per_step, mfu
from veomni_models.flow_decoder import FlowDecoder
from veomni_models.foundation import build_foundation_model, build_processor, build_tokenizer, load_config
from veomni_models.fused_cross_entropy import fused_linear_cross_entropy, use_fused_loss
from veomni_models.initialization import copy_weights, initialize_weights
from veomni_models.log_probs import fused_linear_log_probs, sum_by_sample, use_log_probs
from veomni_models.omni import OmniModel, build_omni_model, load_decoders, load_encoders
from veomni_models.omni_config import OmniConfig, is_omni_folder
from veomni_models.omni_processor import OmniProcessor, build_omni_processor
from veomni_models.plan import plan_for
from veomni_models.preference import dpo_loss, orpo_loss, simpo_loss
from veomni_models.projectors import (
    LinearProjector,
    MLPProjector,
    PerceiverProjector,
    PixelShuffleProjector,
    register_projector,
)
from veomni_models.quantization import quantize_frozen
from veomni_models.segment_attention import register_segment_attention
from veomni_models.tiny import tiny_config
from veomni_models.towers import register_encoder
from veomni_models.vq_tokenizer import VQTokenizer

__all__ = [
    "Distillation",
    "DrawingOptions",
    "FlowDecoder",
    "LinearProjector",
    "MLPProjector",
    "ModelError",
    "OmniConfig",
    "OmniModel",
    "OmniProcessor",
    "PerceiverProjector",
    "PixelShuffleProjector",
    "Reply",
    "VQTokenizer",
    "add_adapters",
    "build_foundation_model",
    "build_omni_model",
    "build_omni_processor",
    "build_picture_decoder",
    "build_processor",
    "build_tokenizer",
    "copy_weights",
    "dpo_loss",
    "drawing_options",
    "flops_per_step",
    "fused_linear_cross_entropy",
    "fused_linear_distillation",
    "fused_linear_log_probs",
    "has_adapters",
    "initialize_adapters",
    "initialize_weights",
    "is_omni_folder",
    "load_config",
    "load_decoders",
    "load_encoders",
    "merge_adapters",
    "mfu",
    "orpo_loss",
    "plan_for",
    "quantize_frozen",
    "register_decoder",
    "register_encoder",
    "register_omni_model",
    "register_projector",
    "register_segment_attention",
    "reply",
    "save_adapters",
    "simpo_loss",
    "sum_by_sample",
    "tiny_config",
    "use_fused_loss",
    "use_log_probs",
    "without_adapters",
]
