"""The nested layout that the reference system took up in 2026, key by key: facts for `migrate` and for messages."""

from __future__ import annotations

from .node import Key, Node
from .schema import nearest

RENAMED = {
    "model.model_config": "model.foundation",
    "model.ops_implementation.attn_implementation": "model.attn_implementation",
    "model.ops_implementation.moe_implementation": "model.moe_implementation",
    "data.dyn_bsz_buffer_size": "train.dyn_bsz_buffer_size",
    "data.dataloader.type": "data.dataloader_type",
    "data.dataloader.num_workers": "data.num_workers",
    "data.dataloader.prefetch_factor": "data.prefetch_factor",
    "data.dataloader.drop_last": "data.drop_last",
    "data.dataloader.pin_memory": "data.pin_memory",
    "data.mm_configs.image_max_pixels": "data.max_pixels",
    "data.mm_configs.fps": "data.fps",
    "data.mm_configs.max_frames": "data.max_frames",
    "train.torch_compile.enable": "train.enable_compile",
    "train.optimizer.type": "train.optimizer",
    "train.optimizer.lr": "train.lr",
    "train.optimizer.lr_min": "train.lr_min",
    "train.optimizer.lr_start": "train.lr_start",
    "train.optimizer.lr_warmup_ratio": "train.lr_warmup_ratio",
    "train.optimizer.lr_decay_style": "train.lr_decay_style",
    "train.optimizer.lr_decay_ratio": "train.lr_decay_ratio",
    "train.optimizer.weight_decay": "train.weight_decay",
    "train.optimizer.no_decay_modules": "train.no_decay_modules",
    "train.optimizer.no_decay_params": "train.no_decay_params",
    "train.optimizer.max_grad_norm": "train.max_grad_norm",
    "train.optimizer.muon_lr": "train.muon_lr",
    "train.optimizer.muon_momentum": "train.muon_momentum",
    "train.optimizer.muon_nesterov": "train.muon_nesterov",
    "train.optimizer.muon_weight_decay": "train.muon_weight_decay",
    "train.optimizer.muon_ns_steps": "train.muon_ns_steps",
    "train.optimizer.muon_ns_coefficients": "train.muon_ns_coefficients",
    "train.optimizer.muon_eps": "train.muon_eps",
    "train.optimizer.muon_adjust_lr_fn": "train.muon_adjust_lr_fn",
    "train.wandb.enable": "train.use_wandb",
    "train.wandb.project": "train.wandb_project",
    "train.wandb.name": "train.wandb_name",
    "train.profile.enable": "train.enable_profiling",
    "train.profile.start_step": "train.profile_start_step",
    "train.profile.end_step": "train.profile_end_step",
    "train.profile.trace_dir": "train.profile_trace_dir",
    "train.profile.record_shapes": "train.profile_record_shapes",
    "train.profile.profile_memory": "train.profile_profile_memory",
    "train.profile.with_stack": "train.profile_with_stack",
    "train.profile.rank0_only": "train.profile_rank0_only",
    "train.gradient_checkpointing.enable": "train.enable_gradient_checkpointing",
    "train.gradient_checkpointing.enable_reentrant": "train.enable_reentrant",
    "train.accelerator.dp_replicate_size": "train.data_parallel_replicate_size",
    "train.accelerator.dp_shard_size": "train.data_parallel_shard_size",
    "train.accelerator.tp_size": "train.tensor_parallel_size",
    "train.accelerator.ep_size": "train.expert_parallel_size",
    "train.accelerator.ep_outside": "train.ep_outside",
    "train.accelerator.pp_size": "train.pipeline_parallel_size",
    "train.accelerator.ulysses_size": "train.ulysses_parallel_size",
    "train.accelerator.enable_async": "train.async_enabled",
    "train.accelerator.cp_size": "train.context_parallel_size",
    "train.accelerator.fsdp_config.fsdp_mode": "train.data_parallel_mode",
    "train.accelerator.fsdp_config.reshard_after_forward": "train.enable_full_shard",
    "train.accelerator.fsdp_config.forward_prefetch": "train.enable_forward_prefetch",
    "train.accelerator.fsdp_config.offload": "train.enable_fsdp_offload",
    "train.accelerator.fsdp_config.mixed_precision.enable": "train.enable_mixed_precision",
    "train.accelerator.offload_config.enable_activation": "train.enable_activation_offload",
    "train.accelerator.offload_config.activation_gpu_limit": "train.activation_gpu_limit",
    "train.checkpoint.output_dir": "train.output_dir",
    "train.checkpoint.manager": "train.ckpt_manager",
    "train.checkpoint.save_async": "train.save_async",
    "train.checkpoint.load_path": "train.load_checkpoint_path",
    "train.checkpoint.save_steps": "train.save_steps",
    "train.checkpoint.save_epochs": "train.save_epochs",
    "train.checkpoint.save_hf_weights": "train.save_hf_weights",
    "dpo_config.beta": "train.dpo_beta",
    "dpo_config.label_smoothing": "train.dpo_label_smoothing",
    "dpo_config.loss_type": "train.dpo_loss",
}

# values that have another name here
VALUES = {("data.data_type", "dpo"): "preference"}

# keys that are left out: nothing here is set by them, for the reason given
_REASONS = {
    "the index is found beside the weights": ("model.safetensor_idx_path",),
    "not supported yet": (
        "train.pad_to_length",
        "train.ep_sharded_stream_load",
        "train.enable_batch_invariant_mode",
        "train.sync_each_train_step",
        "train.moe_load_balance_monitor_interval",
        "train.optimizer.muon_head_group_size",
        "train.optimizer.muon_head_split_modules",
        "train.optimizer.muon_expert_zero_comm",
        "train.optimizer.muon_ns_implementation",
        "train.optimizer.muon_gram_ns_reset_iterations",
        "train.wandb.id",
        "train.profile.with_modules",
        "train.channel_loss.enable",
        "train.channel_loss.interval",
        "train.channel_loss.source_id_keys",
        "train.channel_loss.source_name_keys",
        "train.channel_loss.extra_strip_keys",
        "train.channel_loss.loss_metric_prefix",
        "train.channel_loss.weighted_loss_metric_prefix",
        "train.channel_loss.token_count_metric_prefix",
        "train.channel_loss.log_weighted_loss",
        "train.channel_loss.log_token_count",
        "train.channel_loss.strict",
        "train.gradient_checkpointing.debug",
        "train.gradient_checkpointing.early_stop",
        "train.chunk_mbs_config.enable",
        "train.chunk_mbs_config.chunk_mbs",
        "train.accelerator.extra_parallel_sizes",
        "train.accelerator.extra_parallel_placement_innermost",
        "train.accelerator.extra_parallel_names",
        "train.accelerator.fsdp_config.reshard_after_backward",
        "train.accelerator.fsdp_config.max_load_broadcast_size",
        "train.accelerator.fsdp_config.mixed_precision.param_dtype",
        "train.accelerator.fsdp_config.mixed_precision.reduce_dtype",
        "train.accelerator.fsdp_config.mixed_precision.output_dtype",
        "train.accelerator.fsdp_config.mixed_precision.cast_forward_inputs",
        "train.checkpoint.dcp_save_to_lowest_rank",
        "train.checkpoint.hf_save_steps",
        "train.checkpoint.hf_save_epochs",
        "model.encoder_data_balance",
        "model.encoder_data_balance_sorting_algo",
        "data.mm_configs",
        "model.condition_model_path",
        "model.condition_model_cfg",
        "data.offline_embedding_save_dir",
        "train.training_task",
        "dpo_config.reference_free",
        "dpo_config.average_log_prob",
        "dpo_config.refer_model_precision",
    ),
    "this kernel is chosen for the device of the run": (
        "model.ops_implementation.cross_entropy_loss_implementation",
        "model.ops_implementation.rms_norm_implementation",
        "model.ops_implementation.swiglu_mlp_implementation",
        "model.ops_implementation.rotary_pos_emb_implementation",
        "model.ops_implementation.rotary_pos_emb_vision_implementation",
        "model.ops_implementation.load_balancing_loss_implementation",
        "model.ops_implementation.rms_norm_gated_implementation",
        "model.ops_implementation.causal_conv1d_implementation",
        "model.ops_implementation.chunk_gated_delta_rule_implementation",
        "model.ops_implementation.dsa_indexer_implementation",
        "model.ops_implementation.dsa_attention_implementation",
        "model.ops_implementation.mhc_implementation",
    ),
    "samples are counted": ("data.train_sample",),
    "the loader decides it": (
        "data.dataloader.persistent_workers",
        "data.dataloader.in_order",
        "data.dataloader.worker_num_threads",
        "data.dataloader.use_background_prefetcher",
    ),
    "blocks are compiled with torch's defaults": (
        "train.torch_compile.backend",
        "train.torch_compile.mode",
        "train.torch_compile.fullgraph",
        "train.torch_compile.dynamic",
    ),
    "training data are shuffled by train.seed": ("data.shuffle",),
}
WITHOUT_COUNTERPART = {key: reason for reason, keys in _REASONS.items() for key in keys}

# what a file of that layout means by leaving a key out, where our default differs
DEFAULTS = {
    "train.output_dir": "output",
    "train.data_parallel_mode": "fsdp2",
    "train.init_device": "meta",
    "train.vit_lr": "1e-6",
    "train.muon_weight_decay": "0.0",
    "train.dyn_bsz_runtime": "main",
}

# values that we know too; any other names a kernel that only exists there, and becomes `auto`
KERNELS = {
    "model.attn_implementation": ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "null", "~"),
    "model.moe_implementation": ("eager",),
}

_FREE = ("model.model_config", "model.lora_config", "model.condition_model_cfg", "data.mm_configs")  # any keys below
_SECTIONS = ("model", "data", "train")

BLOCKS = {
    ".".join(parts[:depth])
    for parts in (key.split(".") for key in (*RENAMED, *WITHOUT_COUNTERPART))
    for depth in range(1, len(parts))
}.difference(_SECTIONS)


def why_dropped(key: str) -> str | None:
    """Why a key of the newer layout has nothing to become here; None for a key that is kept, renamed or unknown."""
    if key in RENAMED:
        return None
    free = next((name for name in _FREE if key.startswith(f"{name}.")), key)
    return WITHOUT_COUNTERPART.get(free)


def misspelt(key: str) -> str | None:
    """What is wrong with a key that a block of the newer layout does not have; None for all other keys."""
    block = key.rpartition(".")[0]
    while block and block not in BLOCKS:
        block = block.rpartition(".")[0]
    if not block or block in _FREE or key in BLOCKS or key in RENAMED or why_dropped(key):
        return None
    beside = [known for known in (*RENAMED, *WITHOUT_COUNTERPART, *BLOCKS) if known.rpartition(".")[0] == block]
    name = key.rpartition(".")[2]
    near = nearest(name, beside) or nearest(name, RENAMED.values())
    return "unknown key of the newer layout" + (f", did you mean {near}?" if near else "")


def nearest_block(path: tuple[Key, ...]) -> str | None:
    """The block of the newer layout, in the same section, that `path` most likely stands for."""
    *parents, name = map(str, path)
    return nearest(name, (block for block in BLOCKS if block.split(".")[:-1] == parents))


def newer_layout_hint(path: tuple[Key, ...], node: Node) -> str | None:
    """What to do about a key of the newer layout in a file of ours; None for any other key."""
    key = ".".join(map(str, path))
    is_block = key in BLOCKS and isinstance(node.value, dict)
    if not is_block and key not in RENAMED and why_dropped(key) is None:
        return None
    if node.origin.file:
        return f"belongs to the newer, nested layout: rewrite it by `veomni-config migrate {node.origin.file}`"
    if key in RENAMED:
        return f"is {RENAMED[key]} here"
    return f"has no counterpart here: {why_dropped(key) or 'it is a block of the newer, nested layout'}"
