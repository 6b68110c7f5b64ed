"""`--smoke` for diffusion transformers: a tiny random pipeline of a configuration's family, and real pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from veomni_config import ConfigError, DitRecipeConfig, Problem, parse_args

from veomni_recipes.diffusion_pipeline import build_transformer, load_scheduler
from veomni_recipes.diffusion_transformers import family_of
from veomni_recipes.smoke import write_config

_TEXT, _POOLED = 48, 16
SIZES: dict[str, dict[str, Any]] = {
    "FluxTransformer2DModel": {
        **{"num_attention_heads": 4, "attention_head_dim": 12, "num_layers": 2, "num_single_layers": 2},
        **{"in_channels": 16, "axes_dims_rope": (4, 4, 4)},
        **{"joint_attention_dim": _TEXT, "pooled_projection_dim": _POOLED},
    },
    "SD3Transformer2DModel": {
        **{"num_attention_heads": 4, "attention_head_dim": 12, "num_layers": 2, "caption_projection_dim": 48},
        **{"in_channels": 4, "out_channels": 4, "sample_size": 8, "pos_embed_max_size": 16},
        **{"joint_attention_dim": _TEXT, "pooled_projection_dim": 2 * _POOLED},
    },
    "WanTransformer3DModel": {
        **{"num_attention_heads": 4, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 48, "freq_dim": 16},
        **{"in_channels": 4, "out_channels": 4, "text_dim": _TEXT},
    },
    "DiTTransformer2DModel": {
        **{"num_attention_heads": 4, "attention_head_dim": 12, "num_layers": 2, "in_channels": 4, "out_channels": 8},
        **{"sample_size": 8, "norm_num_groups": 1, "num_embeds_ada_norm": 1000},
    },
}
LABELS, _PROMPTS = ("temple", "flower"), ("a temple in the mountains", "a red flower")


def smoke_dit_config(argv: Sequence[str], processes: int, folder: Path) -> Path:
    """Write a tiny pipeline, pictures or videos that `prepare_dit` has encoded, and the changed configuration.

    Args:
        argv: a YAML file and overrides, whose `train` keys stay as they are given.
        processes: how many ranks will run it.
        folder: made if it is not there.

    Returns:
        The configuration's file.

    Raises:
        ConfigError: the configuration is wrong, or does not say of which family the transformer is.
    """
    from veomni_recipes.tasks.dit import prepare_dit

    cfg = parse_args(DitRecipeConfig, list(argv))
    class_name = cfg.model.transformer.get("_class_name")
    if class_name not in SIZES:
        text = f"--smoke cannot know the transformer of {cfg.model.model_path}: name one of {', '.join(SIZES)}"
        raise ConfigError([Problem("model.transformer._class_name", text)])
    folder.mkdir(parents=True, exist_ok=True)
    model: dict[str, Any] = {"config_path": None, "tokenizer_path": None, "transformer": {"_class_name": class_name}}
    if cfg.model.model_path is None:  # classes and pixels, small enough as they are
        model = {}
    elif not (folder / "pipeline" / "model_index.json").is_file():
        write_tiny_pipeline(cfg, folder / "pipeline")
    if cfg.model.model_path is not None:
        model["model_path"] = str(folder / "pipeline")
    labels = cfg.model.labels or LABELS
    write_pictures(folder, labels if class_name.startswith("DiT") else _PROMPTS, cfg.data.num_frames > 1)
    data = {
        **{"raw_path": str(folder / "pictures.jsonl"), "train_path": str(folder / "encoded")},
        **{"eval_raw_path": str(folder / "prompts.jsonl"), "eval_path": str(folder / "prompts")},
        **{"resolution": min(cfg.data.resolution, 48), "bucket_step": min(cfg.data.bucket_step, 16)},
        **{"num_frames": min(cfg.data.num_frames, 5), "max_prompt_tokens": 32},
        # two pictures of 8 x 8 pixels, or one that a tiny VAE has encoded
        **{"max_seq_len": 32 if cfg.model.model_path is None else 256, "train_size": 100_000, "num_workers": 0},
    }
    path = write_config(cfg, argv, processes, folder, model=model, data=data)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values["data"]["eval_path"] = data["eval_path"]
    values["train"] |= {
        "num_train_epochs": 1,
        "sample_steps": 2,
        "sample_count": 2,
        "num_inference_steps": 4,
        "dyn_bsz_buffer_size": 8,
    }
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    prepare_dit.main([str(path)])
    return path


def write_tiny_pipeline(cfg: DitRecipeConfig, folder: Path) -> None:
    """A pipeline of random weights, of the family and scheduler of a configuration, that diffusers loads."""
    import diffusers

    class_name = cfg.model.transformer["_class_name"]
    known = {key: value for key, value in cfg.model.transformer.items() if isinstance(value, bool | str)}
    config = {**known, **SIZES[class_name]}
    scheduler = load_scheduler(cfg.model.model_copy(update={"model_path": None}))
    pipeline = getattr(diffusers, family_of(class_name).pipeline)
    parts = {"transformer": build_transformer(config, seed=0), "scheduler": scheduler}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if class_name.startswith("DiT"):
            parts["vae"] = _picture_vae(4, shift=None)
        else:
            parts |= _text_encoders(class_name)
            parts["vae"] = _video_vae(4) if class_name.startswith("Wan") else _picture_vae(4)
    pipeline(**parts).save_pretrained(folder)
    if class_name.startswith("DiT"):
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        index["id2label"] = dict(enumerate(cfg.model.labels or LABELS))
        (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _picture_vae(channels: int, shift: float | None = 0.1) -> Any:
    from diffusers import AutoencoderKL

    blocks = 3  # a latent is 4 x 4 pixels
    return AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=channels,
        norm_num_groups=2,
        shift_factor=shift,
    )


def _video_vae(channels: int) -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1] * channels,
        latents_std=[2.0] * channels,
    )


def _text_encoders(class_name: str) -> dict[str, Any]:
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        T5Config,
        T5EncoderModel,
        UMT5Config,
        UMT5EncoderModel,
    )

    tokenizer = _tokenizer()
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1}
    t5 = {**sizes, "d_model": _TEXT, "d_ff": 64, "d_kv": 12, "num_layers": 1, "num_heads": 4}
    if class_name.startswith("Wan"):
        return {"tokenizer": tokenizer, "text_encoder": UMT5EncoderModel(UMT5Config(**t5))}
    clip = CLIPTextConfig(
        **{**sizes, "hidden_size": _POOLED, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"max_position_embeddings": 77, "projection_dim": _POOLED, "bos_token_id": 2},
    )
    words = T5EncoderModel(T5Config(**t5))
    if class_name.startswith("Flux"):
        clips = {"tokenizer": tokenizer, "text_encoder": CLIPTextModel(clip)}
        return {**clips, "tokenizer_2": tokenizer, "text_encoder_2": words}
    return {
        **{"tokenizer": tokenizer, "text_encoder": CLIPTextModelWithProjection(clip)},
        **{"tokenizer_2": tokenizer, "text_encoder_2": CLIPTextModelWithProjection(clip)},
        **{"tokenizer_3": tokenizer, "text_encoder_3": words},
    }


def _tokenizer() -> Any:
    """Letters as tokens: any prompt is another sequence."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<s>", "<unk>"]
    letters = [*special, *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate(letters)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=77, **names)


def write_pictures(folder: Path, prompts: Sequence[str], moving: bool, count: int = 24) -> None:
    """Parts of scikit-learn's two photographs, in three sizes, as pictures or as views that move over them.

    `pictures.jsonl` names them, and `prompts.jsonl` four wishes.
    """
    from PIL import Image
    from sklearn.datasets import load_sample_images

    (folder / "pictures").mkdir(exist_ok=True)
    lines: list[Mapping[str, Any]] = []
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for number in range(count):
        width, height = ((96, 96), (144, 96), (96, 144))[number % 3]
        left, top = 20 * (number % 12), 15 * (number % 7)
        files = []
        for frame in range(8 if moving else 1):
            view = photographs[number % 2].crop((left + 4 * frame, top, left + 4 * frame + width, top + height))
            files.append(f"pictures/{number:03}_{frame}.png")
            view.save(folder / files[-1])
        media = {"video": files} if moving else {"image": files[0]}
        lines.append({**media, "prompt": prompts[number % len(prompts)]})
    (folder / "pictures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    wishes = [json.dumps({"prompt": prompts[number % len(prompts)]}) + "\n" for number in range(4)]
    (folder / "prompts.jsonl").write_text("".join(wishes), encoding="utf-8")
