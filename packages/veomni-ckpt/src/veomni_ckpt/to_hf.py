"""Any checkpoint as a Hugging Face folder: byte ranges from file to file through one small buffer.

Neither torch nor numpy is imported unless there is something to compute: another element type, an adapter to merge,
tensors that were saved with odd strides. Files get their whole length first, so that the disk lays them out at once.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from veomni_ckpt.assets import (
    asset_folders,
    copy_assets,
    find_assets,
    gather_assets,
    read_json,
    says_tied,
    with_dtype,
    write_config,
)
from veomni_ckpt.block_writer import BlockWriter
from veomni_ckpt.checkpoint import Checkpoint
from veomni_ckpt.dcp_checkpoint import DcpCheckpoint
from veomni_ckpt.dtypes import Dtype, target_dtype
from veomni_ckpt.durable import restore_replaced
from veomni_ckpt.errors import CheckpointError
from veomni_ckpt.file_writer import BLOCK, write_file
from veomni_ckpt.key_map import apply_key_map, model_names
from veomni_ckpt.lora import check_merge, has_adapters, plan_merge, read_adapter_config
from veomni_ckpt.open_checkpoint import open_checkpoint
from veomni_ckpt.output_files import Output, OutputFile, parse_size, plan_files, split_names
from veomni_ckpt.resumable_folder import ResumableFolder, resumable_folder
from veomni_ckpt.safetensors_files import write_index
from veomni_ckpt.same_bytes import same_bytes

Progress = Callable[[int, int], None]

_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


@dataclass
class Conversion:
    """What was written.

    Attributes:
        folder: the Hugging Face folder.
        tensors: number of tensors in it.
        nbytes: their size.
        files: names of the safetensors files.
        assets: names of the other files.
        tied: names that were left out because they are another tensor's, as the config says.
        left_out: names in the checkpoint that are not the model's: optimizer, extra state, items that are no tensors.
        has_adapters: there are LoRA adapters in it, unmerged.
    """

    folder: Path
    tensors: int = 0
    nbytes: int = 0
    files: list[str] = field(default_factory=list)
    assets: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    has_adapters: bool = False


def dcp_to_hf(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    assets: str | Path | Sequence[str | Path] | None = None,
    key_map: Mapping[str, str | None] | None = None,
    root: str | None = None,
    base_model: str | Path | None = None,
    merge_lora: bool | str = False,
    lora_alpha: float | None = None,
    split_parts: bool | Mapping[str, str] = False,
    overwrite: bool = False,
    sync: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write a checkpoint as a Hugging Face folder: safetensors, index, config and tokenizer files.

    The folder appears under its name when it is complete. A conversion that was killed goes on, when it is called
    again with the same arguments, after the last file that was finished.

    Args:
        src: a DCP folder of any trainer, or another format that `open_checkpoint` knows.
        dst: a name that is free.
        dtype: floating-point tensors are converted to it: "bfloat16", "float16", "float32", "float64" (or torch's).
            Rounds as torch does; a NaN becomes a quiet one of its sign.
        max_shard_size: bytes, or a string such as "5GB"; a larger tensor gets a file of its own.
        assets: files, or folders of a config, tokenizer, processor. None: those kept with the checkpoint, or else of
            `base_model`.
        key_map: glob -> new name or None (drop); applied after prefixes of trainers and wrappers are taken off.
        root: where in the saved state dict the model is, such as "app.model"; None: found.
        base_model: a folder whose config and tokenizer are taken, and whose weights adapters are merged into if the
            checkpoint has none.
        merge_lora: True: the adapter that is in the checkpoint; or the name of one of several.
        lora_alpha: of the adapter; None: from `adapter_config.json` beside the checkpoint, in `assets` or `base_model`.
        split_parts: True: a folder for each part of an omni model; or folder -> prefix of names.
        overwrite: an older Hugging Face folder is replaced; any other folder is refused.
        sync: return when all is on the disk, as safe from a power failure as from a kill.
        progress: called with (bytes written, bytes in all), several times a second.

    Raises:
        CheckpointError: with the file, tensor or option and the reason; nothing is left behind.
    """
    src, dst = Path(src), Path(dst)
    limit = parse_size(max_shard_size)
    try:
        target = target_dtype(None if dtype is None else str(dtype).removeprefix("torch."))
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    parent = dst.absolute().parent
    if not parent.is_dir() and parent.exists():
        raise CheckpointError(f"{dst} cannot be written: {parent} is no folder")
    _check_free(dst, overwrite)
    try:
        with ExitStack() as stack:
            scratch = parent if parent.is_dir() else None
            checkpoint = stack.enter_context(open_checkpoint(src, scratch))
            base = stack.enter_context(open_checkpoint(base_model, scratch)) if base_model is not None else None
            asset_list = _assets(checkpoint, assets, base)
            config = _config(asset_list)
            outputs, conversion = _plan(checkpoint, base, dst, root, key_map, merge_lora, lora_alpha, assets)
            outputs = _without_tied(outputs, config, conversion)
            outputs = [replace(output, dtype=_dtype(output, target)) for output in outputs]
            files = _plan_folders(outputs, limit, split_parts)
            with resumable_folder(dst, _fingerprint(checkpoint, base, files)) as folder:
                _write_files(folder, files, progress)
                _write_indexes(folder.path, files)
                name = target.name if target else None
                copy_assets(asset_list, folder.path, name)
                if split_parts is not False:
                    _write_part_configs(folder.path, files, config, name)
                folder.publish(sync=sync)
            conversion.nbytes = sum(output.nbytes for output in outputs)
            conversion.tensors = len(outputs)
            conversion.files = [file.path.as_posix() for file in files]
            conversion.assets = [file.name for file in asset_list]
    except OSError as error:
        raise CheckpointError(f"{dst} was not written ({error.strerror or error})") from error
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{dst} was not written: to convert or merge tensors install `{error.name}`") from error
    return conversion


def _check_free(dst: Path, overwrite: bool) -> None:
    restore_replaced(dst)
    if not dst.exists() and not dst.is_symlink():
        return
    if not dst.is_dir():
        raise CheckpointError(f"{dst} exists and is no folder: give a name that is free")
    names = {entry.name for entry in os.scandir(dst)}
    is_hugging_face = "config.json" in names or any(name.endswith(".safetensors") for name in names)
    if names and not (overwrite and is_hugging_face):
        hint = ", or overwrite" if is_hugging_face else ""
        raise CheckpointError(f"{dst} exists: give a name that is free{hint}")


def _assets(
    checkpoint: Checkpoint, assets: str | Path | Sequence[str | Path] | None, base: Checkpoint | None
) -> list[Path]:
    if assets is not None:
        return gather_assets([assets] if isinstance(assets, str | Path) else assets)
    return find_assets(checkpoint.folder()) or (find_assets(base.folder()) if base else [])


def _config(asset_list: Sequence[Path]) -> dict[str, Any]:
    return next((read_json(file) for file in asset_list if file.name == "config.json"), {})


def _plan(
    checkpoint: Checkpoint,
    base: Checkpoint | None,
    dst: Path,
    root: str | None,
    key_map: Mapping[str, str | None] | None,
    merge_lora: bool | str,
    lora_alpha: float | None,
    assets: str | Path | Sequence[str | Path] | None,
) -> tuple[list[Output], Conversion]:
    """The tensors that will be written, under their final names."""
    names = model_names(checkpoint, root)
    conversion = Conversion(dst)
    model = set(names.values())
    conversion.left_out = [name for name in checkpoint.tensors if name not in model] + checkpoint.objects
    conversion.has_adapters = has_adapters(names) and merge_lora is False
    origins = dict.fromkeys(names, checkpoint)
    merges = {}
    if merge_lora is False:
        if lora_alpha is not None:
            raise CheckpointError("lora_alpha is for merging an adapter: give merge_lora too")
    else:
        given = [assets] if isinstance(assets, str | Path) else list(assets or ())
        folders = [Path(path) for path in given] + asset_folders(checkpoint.folder())
        config = read_adapter_config(folders + ([base.folder()] if base else []))
        base_names = model_names(base) if base else {}
        adapter = None if merge_lora is True else merge_lora
        plan = plan_merge(checkpoint, names, base_names, config, alpha=lora_alpha, adapter=adapter)
        merges = plan.merges
        origins = dict.fromkeys(plan.names, checkpoint)
        if base is not None:
            origins.update(dict.fromkeys(plan.base_names, base))
        names = {**plan.base_names, **plan.names}
    renamed = apply_key_map({name: name for name in names}, key_map or {})
    outputs = []
    for new, name in renamed.items():
        origin = origins[name]
        source = origin.tensors[names[name]]
        origin.pieces(source.name)  # all of it is there, before anything is written
        if name in merges:
            check_merge(checkpoint, merges[name], source)
        outputs.append(Output(new, origin, source, source.dtype, merges.get(name), checkpoint))
    if not outputs:
        raise CheckpointError(f"{checkpoint.path} has no tensor left to write")
    return outputs, conversion


def _dtype(output: Output, target: Dtype | None) -> Dtype:
    return target if target is not None and output.source.dtype.is_floating else output.source.dtype


def _without_tied(outputs: list[Output], config: dict[str, Any], conversion: Conversion) -> list[Output]:
    """Without the heads that the config says are the embedding, if they are, byte by byte."""
    if not says_tied(config):
        return outputs
    embeddings = [output for output in outputs if output.name.endswith(_EMBEDDINGS) and output.merge is None]
    for head in [output for output in outputs if output.name.endswith(_HEADS) and output.merge is None]:
        if any(same_bytes(head.origin, head.source, other.origin, other.source) for other in embeddings):
            conversion.tied.append(head.name)
    return [output for output in outputs if output.name not in conversion.tied]


def _plan_folders(outputs: list[Output], limit: int, parts: bool | Mapping[str, str]) -> list[OutputFile]:
    by_name = {output.name: output for output in outputs}
    files = []
    for folder, names in split_names(by_name, parts).items():
        renamed = [replace(by_name[name], name=short) for name, short in names]
        files += plan_files(renamed, limit, Path(folder))
    return files


def _fingerprint(checkpoint: Checkpoint, base: Checkpoint | None, files: list[OutputFile]) -> str:
    """Changes with anything that the output depends on, and with a restart of the machine: pages may be lost then."""
    digest = hashlib.blake2b(digest_size=16)
    for origin in (checkpoint, base):
        tables = [metadata.path for metadata in origin.metadata] if isinstance(origin, DcpCheckpoint) else []
        for path in tables + origin.files if origin else ():
            status = path.stat()
            digest.update(f"{path.absolute()} {status.st_size} {status.st_mtime_ns}\n".encode())
    for file in files:
        digest.update(str(file.path).encode() + file.head)
        for output in file.outputs:
            digest.update(f"{output.source.name} {output.merge}\n".encode())
    boot = Path("/proc/sys/kernel/random/boot_id")
    digest.update(boot.read_bytes() if boot.is_file() else b"")
    return digest.hexdigest()


def _write_files(folder: ResumableFolder, files: list[OutputFile], progress: Progress | None) -> None:
    total = sum(file.nbytes for file in files)
    done = 0
    with BlockWriter(BLOCK) as writer:
        for file in files:
            name = file.path.as_posix()
            if name in folder.finished:
                done += file.nbytes
                continue
            path = folder.path / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            for count in write_file(path, file, writer):
                done += count
                if progress is not None:
                    progress(done, total)
            folder.finish(name)


def _write_indexes(partial: Path, files: list[OutputFile]) -> None:
    folders: dict[Path, list[OutputFile]] = {}
    for file in files:
        folders.setdefault(file.path.parent, []).append(file)
    for folder, inside in folders.items():
        if len(inside) > 1:
            total = sum(output.nbytes for file in inside for output in file.outputs)
            weight_map = {output.name: file.path.name for file in inside for output in file.outputs}
            write_index(partial / folder, total, weight_map)


def _write_part_configs(partial: Path, files: list[OutputFile], config: dict[str, Any], dtype: str | None) -> None:
    """The config of each part that the whole config has one for."""
    for folder in {file.path.parent for file in files}:
        kind, _, modality = folder.as_posix().partition("/")
        part: Any = config.get("text_config") if kind == "foundation" else None
        if kind in ("encoders", "decoders") and isinstance(config.get(kind), dict):
            described = config[kind].get(modality)
            part = described.get("config") if isinstance(described, dict) else None
        if isinstance(part, dict):
            write_config(with_dtype(part, dtype) if dtype else part, partial / folder)
