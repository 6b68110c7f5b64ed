"""The `train` section: optimization, batches, sharding, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from .section import Names, Section, Switch, rule

DerivedSize: TypeAlias = Literal[-1] | Annotated[int, Field(ge=1)]


def _not_empty(value: Any) -> Any:
    if value == "":
        raise ValueError("an empty path given; allowed: a folder")
    return value


class TrainConfig(Section):
    """How the model is trained: optimization, batches, sharding, checkpoints."""

    output_dir: Annotated[
        Path, BeforeValidator(_not_empty, json_schema_input_type=Annotated[str, Field(min_length=1)])
    ] = Field(description="Run folder: resolved configuration, metrics, checkpoints and exported weights go there.")
    vit_lr: float | None = Field(
        default=None,
        ge=0,
        description="Peak learning rate of the encoders of pictures and videos; null is `train.lr`.",
    )
    train_architecture: Literal["full", "lora"] = Field(
        default="full", description="Whether all weights are trained, or low-rank adapters beside them."
    )
    lr: float = Field(default=5e-5, ge=0, description="Peak learning rate.")
    lr_min: float = Field(default=1e-7, ge=0, description="Learning rate at the end of the decay.")
    lr_start: float = Field(default=0.0, ge=0, description="Learning rate at the first step of the warm-up.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay, a factor of the learning rate.")
    no_decay_modules: Names = Field(default=(), description="Class names of modules whose parameters do not decay.")
    no_decay_params: Names = Field(default=(), description="Parts of parameter names that do not decay.")
    optimizer: Literal["adamw", "anyprecision_adamw", "adamw_8bit", "adafactor", "muon"] = Field(
        default="adamw",
        description="`adamw`, with its states in bfloat16 (`anyprecision_adamw`) or 8 bits (`adamw_8bit`, by torchao); "
        "`adafactor`; or `muon` for the matrices of hidden layers, with AdamW for all other parameters.",
    )
    muon_lr: float | None = Field(
        default=None, ge=0, description="Peak learning rate of Muon's matrices; null is `train.lr`."
    )
    muon_weight_decay: float | None = Field(
        default=None, ge=0, description="Decoupled weight decay of Muon's matrices; null is `train.weight_decay`."
    )
    muon_momentum: float = Field(default=0.95, ge=0, lt=1, description="Share of Muon's momentum that a step keeps.")
    muon_nesterov: bool = Field(default=True, description="Whether Muon's momentum is Nesterov's.")
    muon_ns_steps: int = Field(default=5, ge=1, lt=100, description="Newton-Schulz iterations of a step of Muon.")
    muon_ns_coefficients: tuple[float, float, float] = Field(
        default=(3.4445, -4.7750, 2.0315), description="The polynomial of those iterations: of x, x^3 and x^5."
    )
    muon_eps: float = Field(default=1e-7, gt=0, description="Least norm by which those iterations divide a matrix.")
    muon_adjust_lr_fn: Literal["original", "match_rms_adamw"] = Field(
        default="match_rms_adamw",
        description="How Muon's learning rate follows a matrix's shape: `match_rms_adamw` makes steps as long as "
        "AdamW's, so that its learning rates hold; `original` is the square root of rows over columns, at least 1.",
    )
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Share that a moving average of the weights keeps of itself each step, such as 0.999; the exported "
        "model has the averaged weights, checkpoints have both. Null for none.",
    )
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="Norm that the gradient of all parameters is clipped to."
    )
    micro_batch_size: int = Field(default=1, ge=1, description="Rows of a forward pass on each data-parallel rank.")
    global_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="Rows of an optimizer step over all ranks; null is `micro_batch_size` times the data-parallel "
        "size.",
    )
    num_train_epochs: int = Field(default=1, ge=1, description="Passes over the training data.")
    rmpad: bool = Field(
        default=True,
        description="Whether samples are packed into rows, described by cumulative lengths (`cu_seq_lens`).",
    )
    rmpad_with_pos_ids: bool = Field(
        default=False, description="Whether samples are packed into rows, described by position ids that restart."
    )
    dyn_bsz: bool = Field(
        default=True,
        description="Whether a micro-batch is filled to a budget of `micro_batch_size` times `data.max_seq_len` tokens "
        "instead of a number of samples; without `rmpad` and `rmpad_with_pos_ids` it is padded, not packed.",
    )
    dyn_bsz_margin: int = Field(
        default=0, ge=0, description="Tokens of the budget of a micro-batch that may stay unused."
    )
    dyn_bsz_runtime: Literal["main", "worker"] = Field(
        default="worker", description="Whether micro-batches are filled in the main process or in the loader's workers."
    )
    dyn_bsz_buffer_size: int = Field(default=200, ge=1, description="Samples that packing looks ahead.")
    dyn_bsz_count_mode: Literal["total", "effective"] = Field(
        default="total",
        description="What the budget of a micro-batch counts: all tokens, or only those that are learnt.",
    )
    dyn_bsz_physical_overflow_ratio: float = Field(
        default=1.5,
        ge=1,
        description="Times `data.max_seq_len` that all tokens of a row may be when `effective` ones are counted.",
    )
    balance_ranks: bool = Field(
        default=False,
        description="Whether the rows of a step are dealt to the ranks by their work (tokens and the squares of "
        "attention) instead of in turn.",
    )
    bsz_warmup_ratio: float = Field(
        default=0.0, ge=0, le=1, description="Share of the steps during which the token budget grows, from 0 to 1."
    )
    bsz_warmup_init_mbtoken: int = Field(
        default=200, ge=1, description="Token budget of a micro-batch at the start of that growth."
    )
    lr_warmup_ratio: float = Field(
        default=0.0, ge=0, le=1, description="Share of the steps during which the learning rate rises, from 0 to 1."
    )
    lr_decay_style: Literal["constant", "linear", "cosine", "wsd"] = Field(
        default="constant",
        description="How the learning rate goes from its peak to `train.lr_min`; `wsd` stays at the peak until "
        "`lr_stable_ratio`, then goes down in a line.",
    )
    lr_stable_ratio: float = Field(
        default=0.8, ge=0, le=1, description="Share of the steps after which the decay of `wsd` begins, from 0 to 1."
    )
    lr_decay_ratio: float = Field(
        default=1.0, gt=0, le=1, description="Share of the steps after which the decay is complete, from 0 to 1."
    )
    enable_mixed_precision: bool = Field(
        default=True, description="Whether bfloat16 computes, on float32 master weights."
    )
    enable_gradient_checkpointing: bool = Field(
        default=True, description="Whether activations are computed again in the backward pass, to save memory."
    )
    enable_reentrant: bool = Field(
        default=False,
        json_schema_extra={"legacy": "gradient checkpointing is never the reentrant one, which hooks do not survive"},
        description="Whether gradient checkpointing is torch's reentrant one.",
    )
    enable_fused_loss: bool = Field(
        default=True,
        description="Whether the loss is computed in chunks of tokens, without the logits of a whole row; `false` for "
        "a model whose head does more than that knows.",
    )
    enable_full_shard: bool = Field(
        default=True,
        description="Whether FSDP frees the whole parameters after the forward pass (ZeRO-3), or not (ZeRO-2).",
    )
    enable_forward_prefetch: bool = Field(
        default=True, description="Whether FSDP gathers the next unit's parameters while this one computes."
    )
    enable_fsdp_offload: bool = Field(
        default=False, description="Whether FSDP keeps parameters, gradients and optimizer states in host memory."
    )
    enable_activation_offload: bool = Field(
        default=False, description="Whether activations wait in host memory for the backward pass."
    )
    activation_gpu_limit: float = Field(
        default=0.0, ge=0, description="Activations that stay on the device all the same, in GB."
    )
    init_device: Literal["cpu", "cuda", "meta", "npu"] = Field(
        default="cuda",
        description="Where weights are first made: `cpu` in host memory; `cuda` and `npu` on the device of the run, "
        "whichever that is; `meta` nowhere until the model is sharded, then on each rank its shard.",
    )
    broadcast_model_weights_from_rank0: bool = Field(
        default=True,
        description="Whether one rank reads pretrained weights from the disk and sends them to the others.",
    )
    enable_full_determinism: bool = Field(
        default=False, description="Whether only deterministic kernels are used, so that a run repeats bit by bit."
    )
    empty_cache_steps: int = Field(
        default=500, ge=0, description="Steps between two releases of cached device memory; 0 for never."
    )
    gc_steps: int = Field(
        default=500,
        ge=0,
        description="Steps between two collections of Python's garbage, made on all ranks at once; 0 leaves it to "
        "Python.",
    )
    data_parallel_mode: Literal["ddp", "fsdp1", "fsdp2"] = Field(
        default="ddp", description="Whether ranks hold whole copies of the model (`ddp`), or shards of it."
    )
    data_parallel_replicate_size: DerivedSize = Field(
        default=-1, description="Copies of the sharded model (HSDP); -1 follows from the other sizes."
    )
    data_parallel_shard_size: DerivedSize = Field(
        default=-1, description="Data-parallel ranks that share one copy of the model; -1 follows from the other sizes."
    )
    tensor_parallel_size: int = Field(default=1, ge=1, description="Ranks that split each matrix.")
    expert_parallel_size: int = Field(default=1, ge=1, description="Ranks that the experts are dealt to.")
    ep_outside: bool = Field(
        default=False,
        description="Whether the ranks of an expert group lie far apart, with their FSDP shards close together.",
    )
    pipeline_parallel_size: int = Field(
        default=1, ge=1, le=1, description="Ranks that split the layers; only 1 so far."
    )
    ulysses_parallel_size: int = Field(
        default=1,
        ge=1,
        description="Ranks that split the rows of a batch along the sequence, and heads within attention.",
    )
    context_parallel_size: int = Field(default=1, ge=1, le=1, description="Ranks of ring attention; only 1 so far.")
    ckpt_manager: Literal["dcp"] = Field(
        default="dcp", description="Format of checkpoints: torch's distributed checkpoint."
    )
    save_async: bool = Field(default=False, description="Whether checkpoints are written while training goes on.")
    load_checkpoint_path: str | None = Field(
        default=None,
        min_length=1,
        description="Checkpoint that the run resumes from: a path, or `auto` for the newest complete one of "
        "`train.output_dir`, if any; null starts anew.",
    )
    save_steps: int = Field(default=0, ge=0, description="Steps between two checkpoints; 0 for none between epochs.")
    save_epochs: int = Field(default=1, ge=0, description="Epochs between two checkpoints; 0 for none at their ends.")
    keep_last: int | None = Field(
        default=None, ge=1, description="Newest checkpoints that are kept, besides the best; null keeps all."
    )
    eval_steps: int = Field(
        default=0, ge=0, description="Steps between two validations on `data.eval_path`; 0 for none between epochs."
    )
    eval_epochs: int = Field(default=0, ge=0, description="Epochs between two validations; 0 for none at their ends.")
    eval_answers: int = Field(
        default=0,
        ge=0,
        description="Questions of `data.eval_path` that a validation answers by generation, with an exported model; 0 "
        "for its loss alone.",
    )
    best_metric: Literal["loss", "accuracy"] | None = Field(
        default=None,
        description="Figure of the validations by which the best checkpoint is chosen, saved and kept; null for none.",
    )
    save_hf_weights: bool = Field(
        default=True, description="Whether a checkpoint is exported as a Hugging Face folder at the end."
    )
    export_checkpoint: Literal["last", "best"] = Field(
        default="last", description="Which checkpoint that is: the last, or the best by `train.best_metric`."
    )
    seed: int = Field(default=42, ge=0, lt=2**32, description="Seed of weights, data order and dropout.")
    enable_compile: bool = Field(
        default=False, description="Whether the model's blocks are compiled by `torch.compile`."
    )
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        default=(),
        description="Where metrics go besides `metrics.jsonl`: `tensorboard` (into the run folder), `wandb`, `trackio` "
        "(into its own folder, which `TRACKIO_DIR` names). One that fails is left out, the run goes on.",
    )
    use_wandb: bool = Field(default=False, description="Whether `wandb` is one of the trackers.")
    wandb_project: str = Field(
        default="VeOmni", min_length=1, description="Project of the run at Weights & Biases and Trackio."
    )
    wandb_name: str | None = Field(
        default=None, description="Name of the run at Weights & Biases and Trackio; null for one of its own."
    )
    bad_step: Literal["stop", "skip", "ignore"] = Field(
        default="stop",
        description="What becomes of a step whose loss or gradient is NaN, infinite or a spike: the run ends before it "
        "is applied (`stop`), it is left out on all ranks (`skip`), or nobody looks (`ignore`).",
    )
    max_bad_steps: int = Field(
        default=10, ge=1, description="Bad steps one after the other at which a run that skips them ends."
    )
    spike_sigma: float | None = Field(
        default=None,
        gt=0,
        description="Standard deviations above the mean of the last `train.spike_window` good steps from which on a "
        "loss or a gradient norm is a spike; null for no such rule.",
    )
    spike_window: int = Field(default=128, ge=4, description="Steps that a spike is judged by; half of them at least.")
    hang_timeout: float = Field(
        default=1800.0,
        ge=0,
        description="Seconds without a step after which several ranks end together and say which of them is where; 0 "
        "for never. A step, a checkpoint and a validation must take less.",
    )
    enable_profiling: bool = Field(default=False, description="Whether a few steps are traced by torch's profiler.")
    profile_start_step: int = Field(default=1, ge=0, description="First step that is traced, from 1.")
    profile_end_step: int = Field(default=2, ge=1, description="Step before which tracing ends.")
    profile_trace_dir: str = Field(
        default="./trace",
        min_length=1,
        description="Folder of the traces (`.json.gz`, for Perfetto or chrome://tracing), from `train.output_dir`.",
    )
    profile_record_shapes: bool = Field(default=True, description="Whether the traces hold the shapes of tensors.")
    profile_profile_memory: bool = Field(
        default=True,
        description="Whether the traces hold allocations of memory; on CUDA a snapshot of it is written too.",
    )
    profile_with_stack: bool = Field(default=True, description="Whether the traces hold lines of Python code.")
    profile_rank0_only: bool = Field(default=True, description="Whether only rank 0 is traced.")
    max_steps: int | None = Field(
        default=None, ge=1, description="Optimizer steps of an epoch at most; null for no limit."
    )
    async_enabled: Switch = Field(
        default=False,
        description="Whether the exchange between Ulysses ranks overlaps with the projections of attention.",
    )

    def parallel_sizes(self) -> dict[str, int]:
        """The sizes of the mesh by the names that `veomni_parallel.init_parallel_state` gives them; -1 is derived.

        Without sharding (`ddp`) every data-parallel rank is a replica; with it, one copy is sharded over all ranks
        unless a size says otherwise.
        """
        replicate, shard = self.data_parallel_replicate_size, self.data_parallel_shard_size
        if self.data_parallel_mode == "ddp":
            shard = 1
        elif replicate == shard == -1:
            replicate = 1
        return {
            "dp_replicate": replicate,
            "dp_shard": shard,
            "ulysses": self.ulysses_parallel_size,
            "cp": self.context_parallel_size,
            "tp": self.tensor_parallel_size,
            "pp": self.pipeline_parallel_size,
            "ep": self.expert_parallel_size,
        }

    def muon_options(self) -> dict[str, Any]:
        """The arguments of Muon by the names that torch gives them, and the dtype that its iterations compute in."""
        return {
            "lr": self.muon_lr,
            "weight_decay": self.muon_weight_decay,
            "momentum": self.muon_momentum,
            "nesterov": self.muon_nesterov,
            "ns_steps": self.muon_ns_steps,
            "ns_coefficients": self.muon_ns_coefficients,
            "eps": self.muon_eps,
            "adjust_lr_fn": self.muon_adjust_lr_fn,
            "ns_dtype": "bfloat16" if self.enable_mixed_precision else "float32",
        }

    @rule("rmpad_with_pos_ids", "rmpad")
    def _one_description_of_packing(self) -> str | None:
        if self.rmpad and self.rmpad_with_pos_ids:
            return "packing is described in one way: set rmpad to false, or rmpad_with_pos_ids to false"
        return None

    @rule("init_device", "data_parallel_mode")
    def _meta_needs_sharding(self) -> str | None:
        if self.init_device == "meta" and self.data_parallel_mode == "ddp":
            return "meta weights are made by sharding the model: set data_parallel_mode to fsdp2, or init_device to cpu"
        return None

    @rule("data_parallel_shard_size", "data_parallel_mode")
    def _ddp_shards_nothing(self) -> str | None:
        if self.data_parallel_mode == "ddp" and self.data_parallel_shard_size > 1:
            return "ddp shards nothing: set data_parallel_mode to fsdp2, or data_parallel_shard_size to 1"
        return None

    @rule("enable_fsdp_offload", "data_parallel_mode")
    def _offload_needs_sharding(self) -> str | None:
        if self.enable_fsdp_offload and self.data_parallel_mode == "ddp":
            return "it is FSDP that offloads: set data_parallel_mode to fsdp2, or enable_fsdp_offload to false"
        return None

    @rule("expert_parallel_size", "data_parallel_mode")
    def _experts_need_fsdp2(self) -> str | None:
        if self.expert_parallel_size > 1 and self.data_parallel_mode != "fsdp2":
            return (
                "experts are spread together with fsdp2: set data_parallel_mode to fsdp2, or expert_parallel_size to 1"
            )
        return None

    @rule("global_batch_size", "micro_batch_size")
    def _step_is_whole_micro_batches(self) -> str | None:
        size, micro = self.global_batch_size, self.micro_batch_size
        if size is None or size % micro == 0:
            return None
        near = " or ".join(str(value) for value in (size // micro * micro, -(-size // micro) * micro) if value)
        return f"a step is a whole number of micro-batches: set global_batch_size to {near}"

    @rule("lr_warmup_ratio", "lr_decay_ratio", "lr_decay_style")
    def _warmup_ends_before_the_decay(self) -> str | None:
        if self.lr_decay_style != "constant" and self.lr_warmup_ratio >= self.lr_decay_ratio:
            return (
                f"nothing is left for the decay: set lr_warmup_ratio to less than {self.lr_decay_ratio:g}, "
                "or lr_decay_style to constant"
            )
        return None

    @rule("lr_stable_ratio", "lr_warmup_ratio", "lr_decay_ratio", "lr_decay_style")
    def _stable_phase_lies_between(self) -> str | None:
        if self.lr_decay_style == "wsd" and not self.lr_warmup_ratio <= self.lr_stable_ratio < self.lr_decay_ratio:
            return (
                "wsd warms up, stays and then decays: set lr_stable_ratio to at least "
                f"{self.lr_warmup_ratio:g} (lr_warmup_ratio) and less than {self.lr_decay_ratio:g} (lr_decay_ratio)"
            )
        return None

    @rule("lr", "muon_lr")
    def _muon_follows_the_schedule(self) -> str | None:
        if self.lr == 0 and self.muon_lr:
            return "muon_lr follows the schedule of lr in proportion: set lr above 0"
        return None

    @rule("optimizer", "data_parallel_mode")
    def _whole_matrices_or_shards_of_them(self) -> str | None:
        if self.optimizer in ("adamw_8bit", "adafactor", "muon") and self.data_parallel_mode == "fsdp1":
            return (
                "fsdp1 cuts parameters without regard to their shapes: set data_parallel_mode to fsdp2, or optimizer "
                "to adamw"
            )
        return None

    @rule("optimizer", "enable_fsdp_offload")
    def _states_stay_on_the_device(self) -> str | None:
        if self.optimizer in ("adamw_8bit", "adafactor", "muon") and self.enable_fsdp_offload:
            return f"{self.optimizer} computes on the device: set enable_fsdp_offload to false, or optimizer to adamw"
        return None

    @rule("ema_decay", "data_parallel_mode")
    def _average_needs_shapes(self) -> str | None:
        if self.ema_decay is not None and self.data_parallel_mode == "fsdp1":
            return "the average is kept of whole parameters or shards: set data_parallel_mode to fsdp2, or this to null"
        return None

    @rule("lr_min", "lr", "lr_decay_style")
    def _decay_goes_down(self) -> str | None:
        if self.lr_decay_style != "constant" and self.lr_min > self.lr:
            return f"the learning rate would grow: set lr_min to {self.lr} or less"
        return None

    @rule("export_checkpoint", "best_metric")
    def _the_best_is_chosen_by_something(self) -> str | None:
        if self.export_checkpoint == "best" and self.best_metric is None:
            return "no checkpoint is the best one: set best_metric to loss, or export_checkpoint to last"
        return None

    @rule("best_metric", "eval_steps", "eval_epochs")
    def _the_best_is_found_by_validations(self) -> str | None:
        if self.best_metric is not None and not self.eval_steps and not self.eval_epochs:
            return "nothing is validated that could be the best: set eval_epochs to 1, or best_metric to null"
        return None

    @rule("best_metric", "eval_answers")
    def _accuracy_needs_answers(self) -> str | None:
        if self.best_metric == "accuracy" and not self.eval_answers:
            return "accuracy is that of answers: set eval_answers to 100, or best_metric to loss"
        return None

    @rule("profile_end_step", "profile_start_step", "enable_profiling")
    def _trace_ends_after_it_starts(self) -> str | None:
        if self.enable_profiling and self.profile_end_step <= self.profile_start_step:
            return f"tracing ends before it starts: set profile_end_step to {self.profile_start_step + 1} or more"
        return None
