"""The nested layout that the reference system took up in 2026, key by key: facts for `migrate` and for messages."""

from __future__ import annotations

from .node import Key, Node

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
}

# blocks and keys that are left out: nothing here is set by them, for the reason given
WITHOUT_COUNTERPART = {
    "model.safetensor_idx_path": "the index is found beside the weights",
    "model.lora_config": "not supported yet",
    "model.ops_implementation": "this kernel is chosen for the device of the run",
    "model.encoder_data_balance": "not supported yet",
    "model.encoder_data_balance_sorting_algo": "not supported yet",
    "model.condition_model_path": "not supported yet",
    "model.condition_model_cfg": "not supported yet",
    "data.train_sample": "samples are counted",
    "data.mm_configs": "not supported yet",
    "data.offline_embedding_save_dir": "not supported yet",
    "data.shuffle": "training data are shuffled by train.seed",
    "data.dataloader.persistent_workers": "the loader decides it",
    "data.dataloader.in_order": "the loader decides it",
    "data.dataloader.worker_num_threads": "the loader decides it",
    "data.dataloader.use_background_prefetcher": "the loader decides it",
    "train.dyn_bsz_count_mode": "not supported yet",
    "train.dyn_bsz_physical_overflow_ratio": "not supported yet",
    "train.pad_to_length": "not supported yet",
    "train.ep_sharded_stream_load": "not supported yet",
    "train.enable_batch_invariant_mode": "not supported yet",
    "train.sync_each_train_step": "not supported yet",
    "train.eval_steps": "not supported yet",
    "train.eval_epochs": "not supported yet",
    "train.moe_load_balance_monitor_interval": "not supported yet",
    "train.torch_compile": "blocks are compiled with torch's defaults",
    "train.optimizer": "not supported yet",
    "train.wandb.id": "not supported yet",
    "train.profile.with_modules": "not supported yet",
    "train.channel_loss": "not supported yet",
    "train.gradient_checkpointing.debug": "not supported yet",
    "train.gradient_checkpointing.early_stop": "not supported yet",
    "train.chunk_mbs_config": "not supported yet",
    "train.accelerator.extra_parallel_sizes": "not supported yet",
    "train.accelerator.extra_parallel_placement_innermost": "not supported yet",
    "train.accelerator.extra_parallel_names": "not supported yet",
    "train.accelerator.fsdp_config": "not supported yet",
    "train.checkpoint.dcp_save_to_lowest_rank": "not supported yet",
    "train.checkpoint.hf_save_steps": "not supported yet",
    "train.checkpoint.hf_save_epochs": "not supported yet",
    "train.freeze_audio_tower": "not supported yet",
    "train.training_task": "not supported yet",
    "dpo_config": "not supported yet",
}

# what a file of that layout means by leaving a key out, where our default differs
DEFAULTS = {
    "train.output_dir": "output",
    "train.data_parallel_mode": "fsdp2",
    "train.init_device": "meta",
    "train.vit_lr": "1e-6",
    "train.dyn_bsz_runtime": "main",
}

# values that we know too; any other names a kernel that only exists there, and becomes `auto`
KERNELS = {
    "model.attn_implementation": ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "null", "~"),
    "model.moe_implementation": ("eager",),
}

BLOCKS = {
    ".".join(parts[:depth])
    for parts in (key.split(".") for key in (*RENAMED, *WITHOUT_COUNTERPART))
    for depth in range(2, len(parts))
} | {key for key in WITHOUT_COUNTERPART if key in ("train.channel_loss", "train.chunk_mbs_config", "dpo_config")}


def why_dropped(key: str) -> str | None:
    """Why a key of the newer layout has nothing to become here; None for a key that is kept or renamed."""
    if key in RENAMED or key in RENAMED.values():
        return None
    parts = key.split(".")
    found = (WITHOUT_COUNTERPART.get(".".join(parts[:depth])) for depth in range(len(parts), 0, -1))
    return next((reason for reason in found if reason), None)


def newer_layout_hint(path: tuple[Key, ...], node: Node) -> str | None:
    """What to do about a key of the newer layout in a file of ours; None for any other key."""
    key = ".".join(map(str, path))
    is_block = key in BLOCKS and isinstance(node.value, dict)
    if not is_block and key not in RENAMED and why_dropped(key) is None:
        return None
    if node.origin.file:
        return f"belongs to the newer, nested layout: rewrite it by `veomni-config migrate {node.origin.file}`"
    return f"is {RENAMED[key]} here" if key in RENAMED else f"has no counterpart here: {why_dropped(key)}"
