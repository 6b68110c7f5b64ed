"""Small sizes for the config of any architecture, to try a model in seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SIZES: dict[str, int] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim", "embed_dim"), 32
    ),
    **dict.fromkeys(("out_hidden_size", "text_hidden_size", "audio_hidden_size", "n_embed", "output_dim"), 32),
    **dict.fromkeys(("adapter_in_dim", "adapter_input_size", "adapter_out_dim", "adapter_output_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "feed_forward_size"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp", "dense_intermediate_size"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "expert_ffn_hidden_size", "expert_ffn_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("depth", "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "qk_nope_head_dim", "v_head_dim", "linear_key_head_dim"), 8),
    **dict.fromkeys(("linear_value_head_dim", "qk_rope_head_dim", "state_size", "ssm_state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "n_groups"), 1),
    **dict.fromkeys(("mamba_n_groups", "num_nextn_predict_layers"), 1),
    **dict.fromkeys(("vocab_size", "text_vocab_size", "vocab_size_per_layer_input"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions"), 128),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size"), 6),
    **dict.fromkeys(("rotary_dim", "time_step_rank", "mamba_dt_rank", "hidden_size_per_layer_input"), 4),
    **dict.fromkeys(("image_size", "input_size"), 16),
    **dict.fromkeys(("patch_size", "mm_tokens_per_image"), 4),
    "mamba_expand": 2,
    "image_token_id": 3,
    "image_token_index": 3,
    "video_token_id": 4,
    "video_token_index": 4,
    "audio_token_id": 5,
    "audio_token_index": 5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Sizes by the names that configs have for them."""

_IF_MISSING = (
    *("head_dim", "num_experts_per_tok", "n_routed_experts", "num_experts", "num_key_value_heads"),
    *("n_shared_experts", "moe_intermediate_size", "top_k_experts"),
)
"""Sizes that are set where a config leaves them out."""

_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
_HALF = _ROPE | {"partial_rotary_factor": 0.5}
_SECTIONS = {"rope_parameters": _ROPE | {"mrope_section": [2, 1, 1]}}
_EXTRA: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_expert_group": 1},
    "chameleon": {"vocabulary_map": {"<image>": 3}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "dots3_note_text": {
        "head_dim": 16,
        "index_head_dim": 8,
        "index_n_heads": 2,
        "rope_parameters": {"sliding_attention": _HALF, "indexed_attention": _HALF},
    },
    "emu3": {"vocabulary_map": {"<image>": 3}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "fun_asr_nano": {"adaptor_config": {"hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1}},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "intermediate_size": [48, 48],
        "activation_sparsity_pattern": [0.5, 0.0],
        "laurel_rank": 4,
    },
    "gemma4_unified_text": {"num_kv_shared_layers": 0},
    "glm46v_text": _SECTIONS,
    "glm4v_moe_text": _SECTIONS,
    "glm4v_text": _SECTIONS,
    "glm5_next_text": {"qk_rope_head_dim": 0, "num_key_value_heads": 4},
    "glm_ocr_text": _SECTIONS,
    "glmga_text": _SECTIONS,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "granite4_vision": {"deepstack_layer_map": [[-2, 0]], "spatial_target_layers": [0, 1, 1, 1]},
    "hunyuan_vl_text": {"rope_parameters": _ROPE | {"xdrope_section": [1, 1, 1, 1]}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "expand": 2},
    "mistral4": {"head_dim": 16},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "nemotron3_5_transcribe_word_timestamp": {"blank_token_id": 0},
    "paddleocr_vl_text": _SECTIONS,
    "qwen2_5_omni_text": _SECTIONS,
    "qwen2_5_vl_text": _SECTIONS,
    "qwen2_vl_text": _SECTIONS,
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 64,
        "hc_lowrank": 8,
    },
    "radio": {"video_temporal_patch_size": 2},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [4, 6],
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 8,
        "attention_head_size": 8,
        "feed_forward_size": 48,
    },
    "step3p5": {"sliding_window": 6},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "youtu": {"pad_token_id": None},
    "zamba": {"layers_block_type": ["hybrid", "mamba", "hybrid"], "num_hidden_layers": 3},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a config needs beside them."""


def tiny_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config of the same class with small sizes, as its parts have, without dropout and without a cache.

    Works for every model type of transformers that writes text but those that `docs/models/architectures.md` says are
    not built; two layers (more where fewer lack a kind of layer), a vocabulary of 64, hidden size 32.
    """
    kind, keys = type(config), config.to_dict()
    small: dict[str, Any] = {}
    for key, value in _SIZES.items():
        if (key.endswith("_token_id") and key in keys) or (key in keys and keys[key] is None and key in _IF_MISSING):
            small[key] = value
        elif isinstance(keys.get(key), int | float) and not isinstance(keys[key], bool):
            small[key] = min(value, max(int(keys[key]), 1)) if "layers" in key or "group" in key else value
    for key, value in keys.items():
        if isinstance(value, float) and ("drop" in key or "jitter" in key):
            small[key] = 0.0
    if "use_cache" in keys:
        small["use_cache"] = False
    if keys.get("per_layer_config"):
        small["per_layer_config"] = {}
    if "kv_lora_rank" in small and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
    if "mrope_section" in (rope := keys.get("rope_parameters") or {}):
        small["rope_parameters"] = rope | {"mrope_section": [2, 1, 1]}
    if isinstance(keys.get("layer_types"), list):
        kinds = list(dict.fromkeys(keys["layer_types"]))
        small["layer_types"] = (kinds * 2)[: max(2, len(kinds))]
        small["num_hidden_layers"] = len(small["layer_types"])
    for name in kind.sub_configs or {}:
        if (part := getattr(config, name, None)) is not None:
            small[name] = tiny_config(part).to_dict()
    return kind(**small | _EXTRA.get(kind.model_type, {}))
