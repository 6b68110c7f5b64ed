"""`--smoke`: any configuration on any machine in seconds, with a tiny random model of its architecture and real data.

What is tried is the configuration's own: architecture, kind of data, wrapper, parallelism (as far as the processes
divide it), optimizer, adapters. Sizes, paths and the number of steps are not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from veomni_config import (
    ConfigError,
    DistillRecipeConfig,
    DPORecipeConfig,
    OmniRecipeConfig,
    Problem,
    RecipeConfig,
    VLRecipeConfig,
    dump_config,
    parse_args,
)

from veomni_recipes.smoke_data import texts, write_conversations, write_media, write_preferences, write_texts
from veomni_recipes.smoke_vision import save_tiny_model

ARCHITECTURES = {
    "Qwen/Qwen3-0.6B": "qwen3",
    "Qwen/Qwen3-8B": "qwen3",
    "outputs/fortunes/hf_ckpt": "qwen3",
    "Qwen/Qwen3-8B-Base": "qwen3",
    "Qwen/Qwen2-VL-7B-Instruct": "qwen2_vl",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5_vl",
    "Qwen/Qwen3-VL-8B-Instruct": "qwen3_vl",
    "Qwen/Qwen3-VL-30B-A3B-Instruct": "qwen3_vl_moe",
    "Qwen/Qwen2.5-Omni-7B": "qwen2_5_omni_thinker",
    "Qwen/Qwen3-Omni-30B-A3B-Instruct": "qwen3_omni_moe_thinker",
}
"""Model types of the folders that shipped configurations name, which are not on this machine."""

_ENCODERS: dict[str, dict[str, Any]] = {
    "image": {
        "model_type": "siglip_vision_model",
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"image_size": 32, "patch_size": 8},
    },
    "audio": {
        "model_type": "whisper",
        **{"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48},
        **{"num_mel_bins": 40, "max_source_positions": 50, "merge_size": 5},
    },
}
_ENCODERS["video"] = _ENCODERS["image"]
_DECODERS: dict[str, dict[str, Any]] = {
    "image": {
        "model_type": "janus_vqgan",
        **{"num_embeddings": 64, "embed_dim": 8, "num_patches": 4, "channel_multiplier": [1, 1]},
        **{"base_channels": 32, "latent_channels": 32, "num_res_blocks": 1},
    }
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
SPECIAL += ["<|video_pad|>", "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>"]
_CLASSES: dict[str, type[RecipeConfig]] = {
    "train_dpo": DPORecipeConfig,
    "train_distill": DistillRecipeConfig,
    "train_omni_model": OmniRecipeConfig,
    "train_qwen_vl": VLRecipeConfig,
    "train_qwen_omni": VLRecipeConfig,
}
_STEPS: dict[str, Any] = {"max_steps": 3, "save_steps": 2, "micro_batch_size": 1, "data_parallel_replicate_size": -1}
_STEPS |= {"data_parallel_shard_size": -1, "dyn_bsz_margin": 0, "bsz_warmup_ratio": 0.0, "save_epochs": 0}
_STEPS |= {"eval_steps": 0, "eval_epochs": 0, "eval_answers": 0, "best_metric": None, "export_checkpoint": "last"}
_SPLITTING = ("ulysses_parallel_size", "tensor_parallel_size")


def smoke_config(recipe: str, argv: Sequence[str], processes: int, folder: Path) -> Path:
    """Write a tiny model, data and the changed configuration into the folder; returns the configuration's file.

    Args:
        recipe: its name, such as "train_torch".
        argv: a YAML file and overrides, whose `train` keys stay as they are given.
        processes: how many ranks will run it.
        folder: made if it is not there.

    Raises:
        ConfigError: the configuration is wrong, or does not say of which architecture the model is.
    """
    if recipe == "train_dit":
        from veomni_recipes.smoke_dit import smoke_dit_config  # which is built on this module

        return smoke_dit_config(argv, processes, folder)
    cfg = parse_args(_CLASSES.get(recipe, RecipeConfig), list(argv))
    folder.mkdir(parents=True, exist_ok=True)
    model, data = folder / "model", folder / "data.jsonl"
    tokenizer = tiny_tokenizer(texts())
    parts = _tiny_parts(cfg)
    if isinstance(cfg, VLRecipeConfig):
        kinds = save_tiny_model(architecture(cfg), tokenizer, model)
        write_media(data, cfg.data.text_keys, kinds)
    else:
        _tiny_model(cfg, len(tokenizer)).save_pretrained(model)
        tokenizer.save_pretrained(model)
        if isinstance(cfg, DistillRecipeConfig):  # a teacher that knows something else
            _tiny_model(cfg, len(tokenizer), seed=1).save_pretrained(folder / "teacher")
        if parts:
            write_media(data, cfg.data.text_keys, cfg.model.encoders, draw=bool(cfg.model.decoders))
        else:
            writers = {"plaintext": write_texts, "preference": write_preferences}
            writers.get(cfg.data.data_type, write_conversations)(data, cfg.data.text_keys)
    drawn = bool(parts) and cfg.model.model_path is None  # whose weights are random in the configuration too
    length = 1024 if isinstance(cfg, VLRecipeConfig) else 256  # a video alone becomes 256 tokens of an omni model
    return write_config(
        cfg,
        argv,
        processes,
        folder,
        model={
            "model_path": None if drawn else str(model),
            "config_path": str(model) if drawn else None,
            "tokenizer_path": str(model) if drawn else None,
            "foundation": {},
            **({"teacher_path": str(folder / "teacher")} if isinstance(cfg, DistillRecipeConfig) else {}),
            **parts,
        },
        data={"train_path": str(data), "max_seq_len": length, "train_size": 100_000},
    )


def recipe_for(argv: Sequence[str]) -> str:
    """The recipe that a configuration is most likely for.

    Raises:
        ConfigError: the configuration is wrong for all of them.
    """
    written = yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8")) if Path(argv[0]).is_file() else {}
    model = written.get("model") or {} if isinstance(written, dict) else {}
    if model.get("encoders") or model.get("decoders"):
        return "train_omni_model"
    if model.get("transformer"):
        text = (
            "a transformer of diffusers is not compared by this command: `veomni run train_dit CONFIG --smoke` runs it"
        )
        raise ConfigError([Problem("model.transformer", text)])
    kind = architecture(parse_args(VLRecipeConfig, list(argv)))
    return "train_qwen_omni" if "thinker" in kind else "train_qwen_vl" if "_vl" in kind else "train_torch"


def check_arguments(recipe: str, argv: Sequence[str], folder: Path) -> tuple[int, list[str]]:
    """How many ranks `veomni check` takes, and their arguments: a tiny model in float32, the data that there are.

    Args:
        recipe, argv, folder: see `smoke_config`.
    """
    cfg = parse_args(_CLASSES.get(recipe, RecipeConfig), list(argv))
    several = sum(getattr(cfg.train, key) > 1 for key in (*_SPLITTING, "data_parallel_replicate_size"))
    processes = 4 if several > 1 else 2
    path = smoke_config(recipe, argv, processes, folder)
    changes = ["--train.enable_mixed_precision=false", "--train.init_device=cpu", "--data.datasets_type=mapping"]
    if Path(cfg.data.train_path).exists():
        changes.append(f"--data.train_path={cfg.data.train_path}")
    else:
        print(f"{cfg.data.train_path} is not there: small real data take its place", flush=True)
    return processes, [str(path), *changes]


def write_config(
    cfg: RecipeConfig,
    argv: Sequence[str],
    processes: int,
    folder: Path,
    *,
    model: Mapping[str, Any] = {},
    data: Mapping[str, Any] = {},
) -> Path:
    """The configuration with other values for these keys, few steps, and sizes that `processes` ranks divide."""
    path = folder / "run.yaml"
    dump_config(cfg, path)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    given = {argument.removeprefix("--").split("=")[0] for argument in argv if argument.startswith("--")}
    train = {**_STEPS, "output_dir": str(folder / "run"), **_parallel_sizes(cfg, processes)}
    data = {**data, "num_workers": 0, "eval_path": None}
    for section, changes in {"model": model, "data": data, "train": train}.items():
        values[section] |= {key: value for key, value in changes.items() if f"{section}.{key}" not in given}
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def _parallel_sizes(cfg: RecipeConfig, processes: int) -> dict[str, int]:
    left, sizes = processes, dict.fromkeys(_SPLITTING, 1)
    several = [key for key in _SPLITTING if getattr(cfg.train, key) > 1]
    for key in several:
        sizes[key] = left if key == several[-1] else min(2, left)
        left //= sizes[key]
    sizes["expert_parallel_size"] = processes if cfg.train.expert_parallel_size > 1 else 1
    sizes["global_batch_size"] = 2 * left
    return sizes


def architecture(cfg: RecipeConfig) -> str:
    """The model type that a configuration is about.

    Raises:
        ConfigError: it does not say.
    """
    if kind := cfg.model.foundation.get("model_type"):
        return str(kind)
    for path in (cfg.model.config_path, cfg.model.model_path):
        if path in ARCHITECTURES:
            return ARCHITECTURES[path]
        if path is not None and (file := Path(path) / "config.json").is_file():
            return str(json.loads(file.read_text(encoding="utf-8"))["model_type"])
    text = f"{cfg.model.model_path} is not here, so --smoke cannot know its architecture: set it to a local folder"
    raise ConfigError([Problem("model.model_path", text)])


def _tiny_model(cfg: RecipeConfig, vocabulary: int, seed: int = 0) -> Any:
    from transformers import CONFIG_MAPPING
    from transformers.utils.logging import disable_progress_bar
    from veomni_models import build_foundation_model, load_config, tiny_config

    disable_progress_bar()

    kind = architecture(cfg)
    keys = {key: value for key, value in cfg.model.foundation.items() if key != "model_type"}
    config = tiny_config(load_config(None, {"model_type": kind, **keys}) if keys else CONFIG_MAPPING[kind]())
    text = config.get_text_config()
    text.vocab_size = vocabulary + 128  # room for placeholders of media, and codes of pictures
    text.max_position_embeddings = 2048
    for key, value in keys.items():  # what is a choice and no size stays
        if isinstance(value, bool | str):
            setattr(config, key, value)
    return build_foundation_model(config, init_device="cpu", seed=seed)


def _tiny_parts(cfg: RecipeConfig) -> dict[str, Any]:
    """Encoders and decoders as they are configured, but for those whose folder is not here: a tiny one each."""
    return {
        name: {kind: tiny if _is_elsewhere(part) else part for kind, part in parts.items() if (tiny := known[kind])}
        for name, parts, known in (
            ("encoders", cfg.model.encoders, _ENCODERS),
            ("decoders", cfg.model.decoders, _DECODERS),
        )
        if parts
    }


def _is_elsewhere(part: Mapping[str, Any]) -> bool:
    return any(key in part and not Path(str(part[key])).is_dir() for key in ("config_path", "model_path"))


def tiny_tokenizer(texts: Sequence[str], size: int = 1000) -> Any:
    """A byte-level BPE tokenizer of some texts, with the special tokens and chat layout of Qwen models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from veomni_data import get_chat_template

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:],
    )
    fast.chat_template = get_chat_template("chatml", fast).source
    return fast
