"""The files of a Hugging Face folder that are not weights: config, tokenizer, processor."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from veomni_ckpt.errors import CheckpointError

# by name, not "all JSON": a checkpoint folder also holds the state of loaders and optimizers
_NAMES = (
    *("config.json", "generation_config.json", "configuration.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *("*processor_config.json", "*preprocessor_config.json", "feature_extractor*.json"),
    *("chat_template*", "*.jinja", "*.py"),
)


def asset_files(folder: Path) -> list[Path]:
    """The asset files that lie in a folder, by their usual names."""
    if not folder.is_dir():
        return []
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    return [folder / name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in _NAMES)]


def find_assets(checkpoint_folder: Path) -> list[Path]:
    """Asset files kept with a checkpoint: in it, in its `model_assets`, or in that of the run it belongs to."""
    for folder in asset_folders(checkpoint_folder):
        if files := asset_files(folder):
            return files
    return []


def asset_folders(checkpoint_folder: Path) -> list[Path]:
    """Where a checkpoint's asset files may be: `RUN/checkpoints/STEP` has them in `RUN/model_assets` at times."""
    folder = checkpoint_folder.absolute()
    return [checkpoint_folder, folder / "model_assets", folder.parent.parent / "model_assets"]


def gather_assets(assets: Iterable[str | Path]) -> list[Path]:
    """The files that `assets` mean: a file itself, a folder its asset files; of two with one name the first.

    Raises:
        CheckpointError: one is missing, or a folder has none.
    """
    found: dict[str, Path] = {}
    for asset in map(Path, assets):
        files = [asset] if asset.is_file() else asset_files(asset)
        if not files:
            raise CheckpointError(f"the asset {asset} is neither a file nor a folder with a config or a tokenizer")
        for file in files:
            found.setdefault(file.name, file)
    return list(found.values())


def copy_assets(files: Iterable[Path], folder: Path, dtype: str | None) -> None:
    """Copy files into a folder; where the weights are converted, the config says the new `dtype`."""
    for file in files:
        if file.name == "config.json" and dtype is not None:
            try:
                write_config(with_dtype(read_json(file), dtype), folder)
            except RecursionError as error:
                raise CheckpointError(f"{file} is nested too deeply") from error
        else:
            shutil.copyfile(file, folder / file.name)


def write_config(config: dict[str, Any], folder: Path) -> None:
    """Write `config.json`."""
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config, and the configs within, with another element type wherever they say one."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            changed[key] = dtype
        else:
            changed[key] = with_dtype(value, dtype) if isinstance(value, dict) else value
    return changed


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: it is none.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is no JSON object")
    return document


def says_tied(config: dict[str, Any]) -> bool:
    """Whether a config says that the head's weight is the embedding's; a part's config counts where the whole says
    nothing.
    """
    if "tie_word_embeddings" in config:
        return config["tie_word_embeddings"] is True
    parts = [value for key, value in config.items() if re.fullmatch(r"(text|llm|thinker|language)_config", key)]
    return any(isinstance(part, dict) and part.get("tie_word_embeddings") is True for part in parts)
