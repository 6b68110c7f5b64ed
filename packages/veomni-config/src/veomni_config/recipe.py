"""What a recipe is configured by: its sections together, and the rules between them."""

from __future__ import annotations

from .architecture import attention_heads, experts
from .batch_plan import BatchPlan, divisors_near, plan_batches
from .data import DataConfig
from .errors import ConfigError, Problem
from .infer import EvaluateConfig, InferConfig
from .model import ModelConfig
from .section import Section, rule
from .train import TrainConfig


class RecipeConfig(Section):
    """Configuration of a training recipe. A recipe adds keys to a section by subclassing both."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig

    def batch_plan(self, world_size: int, samples: int | None = None) -> BatchPlan:
        """How the rows of a step are dealt to `world_size` ranks, and how many steps there are: see `plan_batches`."""
        return plan_batches(self.train, self.data, world_size, samples)

    def compute_train_steps(self, world_size: int, samples: int | None = None) -> int:
        """Optimizer steps of one epoch; an epoch of all `num_train_epochs`.

        `samples`, the number of training samples, is needed with `train.dyn_bsz: false`. Raises ConfigError where it
        is missing or a size does not divide.
        """
        plan = self.batch_plan(world_size, samples)
        if plan.steps_per_epoch is None:
            text = "without it the steps follow from the number of samples, which is not known: set train.max_steps"
            raise ConfigError([Problem("train.dyn_bsz", text)])
        return plan.steps_per_epoch

    @rule("train.save_hf_weights", "model.config_path")
    def _export_needs_a_configuration(self) -> str | None:
        decoders = [part.get("model_type") for part in self.model.decoders.values()]  # which may be trained alone
        described = self.model.config_path or self.model.foundation.get("model_type") or any(decoders)
        if self.train.save_hf_weights and not described:
            return (
                "the exported folder needs the model's configuration: set model.config_path, model.model_path or "
                "model.foundation.model_type, or train.save_hf_weights to false"
            )
        return None

    @rule("model.lora_config", "train.train_architecture")
    def _adapters_are_asked_for(self) -> str | None:
        if self.model.lora_config and self.train.train_architecture != "lora":
            return "no adapters are trained: set train.train_architecture to lora, or leave lora_config out"
        return None

    @rule("train.data_parallel_mode", "train.train_architecture")
    def _adapters_are_not_flattened(self) -> str | None:
        if self.train.train_architecture == "lora" and self.train.data_parallel_mode == "fsdp1":
            return "fsdp1 flattens adapters and frozen weights together: set data_parallel_mode to fsdp2 or ddp"
        return None

    @rule("model.quantize_frozen", "train.train_architecture")
    def _quantised_layers_are_frozen(self) -> str | None:
        if self.model.quantize_frozen and self.train.train_architecture != "lora":
            return "layers that learn stay whole: set train.train_architecture to lora, or this to null"
        return None

    @rule("model.quantize_frozen", "train.data_parallel_mode")
    def _quantised_layers_are_not_sharded(self) -> str | None:
        if self.model.quantize_frozen and self.train.data_parallel_mode != "ddp":
            return (
                "weights in few bits cannot be sharded: set train.data_parallel_mode to ddp and train.init_device to "
                "cpu or cuda, or this to null"
            )
        return None

    @rule("train.dyn_bsz_margin", "train.micro_batch_size", "data.max_seq_len")
    def _margin_leaves_a_budget(self) -> str | None:
        budget = self.train.micro_batch_size * self.data.max_seq_len
        if self.train.dyn_bsz_margin >= budget:
            return f"nothing is left of a micro-batch's budget: set train.dyn_bsz_margin to less than {budget}"
        return None

    @rule("train.bsz_warmup_init_mbtoken", "train.bsz_warmup_ratio", "train.micro_batch_size", "data.max_seq_len")
    def _warmup_starts_below_its_end(self) -> str | None:
        budget = self.train.micro_batch_size * self.data.max_seq_len
        if self.train.bsz_warmup_ratio > 0 and self.train.bsz_warmup_init_mbtoken > budget:
            return f"the budget would shrink: set train.bsz_warmup_init_mbtoken to {budget} or less"
        return None

    @rule("train.ulysses_parallel_size", "model.config_path", "model.foundation")
    def _ulysses_divides_the_heads(self) -> str | None:
        return _divides(
            "train.ulysses_parallel_size",
            self.train.ulysses_parallel_size,
            attention_heads(self.model),
            "attention heads",
        )

    @rule("train.tensor_parallel_size", "model.config_path", "model.foundation")
    def _tensor_parallel_divides_the_heads(self) -> str | None:
        return _divides(
            "train.tensor_parallel_size",
            self.train.tensor_parallel_size,
            attention_heads(self.model),
            "attention heads",
        )

    @rule("train.ulysses_parallel_size", "train.tensor_parallel_size", "model.config_path", "model.foundation")
    def _ulysses_and_tensor_parallel_divide_the_heads_together(self) -> str | None:
        ulysses, tensor, heads = (
            self.train.ulysses_parallel_size,
            self.train.tensor_parallel_size,
            attention_heads(self.model),
        )
        if heads is None or heads % ulysses or heads % tensor or heads % (ulysses * tensor) == 0:
            return None
        return (
            f"{ulysses} x {tensor} does not divide the model's {heads} attention heads: "
            f"set train.ulysses_parallel_size to {divisors_near(heads // tensor, ulysses)}"
        )

    @rule("train.expert_parallel_size", "model.config_path", "model.foundation")
    def _expert_parallel_divides_the_experts(self) -> str | None:
        return _divides("train.expert_parallel_size", self.train.expert_parallel_size, experts(self.model), "experts")


class InferRecipeConfig(Section):
    """Configuration of the inference script."""

    infer: InferConfig


class EvaluateRecipeConfig(Section):
    """Configuration of the evaluation script."""

    evaluate: EvaluateConfig


def _divides(key: str, size: int, whole: int | None, things: str) -> str | None:
    if whole is None or whole % size == 0:
        return None
    return f"{size} does not divide the model's {whole} {things}: set {key} to {divisors_near(whole, size)}"
