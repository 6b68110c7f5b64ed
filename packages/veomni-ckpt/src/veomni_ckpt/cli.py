"""The command `veomni-ckpt`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from veomni_ckpt.errors import CheckpointError

USAGE = """\
usage: veomni-ckpt COMMAND

  to-hf SRC DST [options]     any checkpoint (DCP of any trainer) -> Hugging Face folder, as fast as copying
  to-dcp SRC DST [options]    Hugging Face folder -> folder that torch.distributed.checkpoint loads
  inspect PATH [--json]       tensors, dtypes, shapes, shards, sizes, extra state; reads metadata only
  verify A B [options]        whether two checkpoints of any formats are equal; names the first difference
  repair FOLDER               give back its name to a folder that a killed replacement had moved aside
  prune FOLDER [--delete]     list what killed saves and conversions left unfinished; --delete deletes it

PATH, SRC, A and B: a DCP folder (.metadata, or __N.metadata of each rank), a Hugging Face folder, shards of torch's
HuggingFaceStorageWriter, or a safetensors file. Nothing in a checkpoint is ever executed.
`veomni-ckpt COMMAND --help` lists the options. Exit codes: 0 done (verify: equal), 1 verify: different, 2 error.
"""

TO_HF = """\
usage: veomni-ckpt to-hf SRC DST [options]

  --dtype TYPE            convert floating-point tensors: bfloat16, float16, float32, float64
  --max-shard-size SIZE   of a file, such as 5GB (the default) or 200MB
  --assets PATH           config, tokenizer and processor: a folder or a file; repeatable
                          (default: those kept with the checkpoint, or else the base model's)
  --base-model FOLDER     Hugging Face folder to take these from, and weights to merge an adapter into
  --map 'OLD=NEW'         rename by globs, such as 'backbone.*=model.*'; repeatable, the first that fits counts
  --drop GLOB             leave tensors out; repeatable
  --root KEY              where in the saved state the model is, such as app.model (default: found)
  --merge-lora[=NAME]     merge the LoRA adapter (of several, the one of that name) into its weights
  --lora-alpha NUMBER     its alpha (default: from adapter_config.json)
  --split-parts           omni models: a folder for foundation, each encoder, decoder and projector
  --part FOLDER=PREFIX    the same for parts that you name; repeatable
  --overwrite             replace an older Hugging Face folder
  --sync                  end when all is on the disk
  --quiet                 no progress bar, no summary

Prefixes of trainers and wrappers (model. app. module. _orig_mod. ...) are taken off where the saved state shows that
they are such; optimizer and extra state are left out. DST appears when it is complete. A conversion that was killed
goes on when the same command is given again.
"""

TO_DCP = """\
usage: veomni-ckpt to-dcp SRC DST [options]

  --root KEY              key of the model in the state dict (default: model; '' for none)
  --dtype TYPE            convert floating-point tensors
  --quiet                 no progress bar
"""

VERIFY = """\
usage: veomni-ckpt verify A B [options]

  --tolerance NUMBER      floating-point values may differ by NUMBER * (1 + |value|), element types may differ
                          (default: bit by bit)
  --all                   name every tensor that differs, not only the first
  --quiet                 no progress bar
"""

Command = Callable[[list[str]], int]


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0, 1 (`verify`: different) or 2 (one sentence on standard error)."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    commands: dict[str, tuple[Command, str]] = {
        "to-hf": (_to_hf, TO_HF),
        "to-dcp": (_to_dcp, TO_DCP),
        "inspect": (_inspect, USAGE),
        "verify": (_verify, VERIFY),
        "repair": (_repair, USAGE),
        "prune": (_prune, USAGE),
    }
    chosen = commands.get(arguments[0]) if arguments else None
    if {"-h", "--help"} & set(arguments) or arguments[:1] == ["help"]:
        print(chosen[1] if chosen else USAGE, end="")
        return 0
    if chosen is None:
        wrong = f"veomni-ckpt: {arguments[0]!r} is no command\n" if arguments else ""
        print(wrong + USAGE, end="", file=sys.stderr)
        return 2
    try:
        code = chosen[0](arguments[1:])
        sys.stdout.flush()
    except CheckpointError as error:
        print(f"veomni-ckpt: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `veomni-ckpt inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"veomni-ckpt: {error}", file=sys.stderr)
        return 2
    except MemoryError:
        print("veomni-ckpt: there is not enough memory", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("veomni-ckpt: interrupted; to-hf goes on when it is given again", file=sys.stderr)
        return 130
    return code


def _one_line(text: str) -> str:
    """Names of a strange file may hold anything: nothing that a terminal would obey."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _to_hf(arguments: list[str]) -> int:
    from veomni_ckpt.inspection import format_size
    from veomni_ckpt.to_hf import dcp_to_hf

    dtype, size = _take(arguments, "--dtype"), _take(arguments, "--max-shard-size") or "5GB"
    assets, base = _take_all(arguments, "--assets"), _take(arguments, "--base-model")
    key_map: dict[str, str | None] = dict.fromkeys(_take_all(arguments, "--drop"))
    key_map |= dict(_pair(text, "--map") for text in _take_all(arguments, "--map"))
    root, alpha = _take(arguments, "--root"), _number(_take(arguments, "--lora-alpha"), "--lora-alpha")
    merge: bool | str = _flag(arguments, "--merge-lora")
    for argument in [argument for argument in arguments if argument.startswith("--merge-lora=")]:
        arguments.remove(argument)
        merge = argument.partition("=")[2]
    named = dict(_pair(text, "--part") for text in _take_all(arguments, "--part"))
    parts: bool | dict[str, str] = _flag(arguments, "--split-parts")
    overwrite, sync, quiet = (_flag(arguments, option) for option in ("--overwrite", "--sync", "--quiet"))
    src, dst = _operands(arguments, 2, "to-hf takes a checkpoint and the name of a folder to be made")
    with_bar = _Bar("writing", quiet)
    try:
        done = dcp_to_hf(
            src,
            dst,
            dtype=dtype,
            max_shard_size=size,
            assets=assets or None,
            key_map=key_map,
            root=root,
            base_model=base,
            merge_lora=merge,
            lora_alpha=alpha,
            split_parts=named or parts,
            overwrite=overwrite,
            sync=sync,
            progress=with_bar.update,
        )
    finally:
        with_bar.close()
    if not quiet:
        files = "1 file" if len(done.files) == 1 else f"{len(done.files)} files"
        print(f"{dst}: {done.tensors} tensors, {format_size(done.nbytes)} in {files}")
        if done.assets:
            print(f"  with {', '.join(done.assets)}")
        else:
            print(
                "  without a config or tokenizer: none is kept with the checkpoint, --assets or --base-model adds them"
            )
        if done.tied:
            print(f"  tied, so written once: {', '.join(done.tied)}")
        if done.left_out:
            more = f" and {len(done.left_out) - 3} more" if len(done.left_out) > 3 else ""
            print(f"  not of the model, left out: {_one_line(', '.join(done.left_out[:3]))}{more}")
        if done.has_adapters:
            print("  it has LoRA adapters, written as they are: --merge-lora merges them")
    return 0


def _to_dcp(arguments: list[str]) -> int:
    from veomni_ckpt.to_dcp import hf_to_dcp

    root, dtype, quiet = _take(arguments, "--root"), _take(arguments, "--dtype"), _flag(arguments, "--quiet")
    src, dst = _operands(arguments, 2, "to-dcp takes a Hugging Face folder and the name of a folder to be made")
    bar = _Bar("writing", quiet)
    try:
        hf_to_dcp(src, dst, root="model" if root is None else root, dtype=dtype, progress=bar.update)
    finally:
        bar.close()
    return 0


def _inspect(arguments: list[str]) -> int:
    from veomni_ckpt.inspection import format_inspection, inspect

    as_json = _flag(arguments, "--json")
    (path,) = _operands(arguments, 1, "inspect takes a checkpoint")
    found = inspect(path)
    if as_json:
        print(found.to_json())
    else:
        lines = format_inspection(found).splitlines()
        print("".join(f"{_one_line(line)}\n" for line in lines), end="")
    return 0


def _verify(arguments: list[str]) -> int:
    from veomni_ckpt.inspection import format_size
    from veomni_ckpt.verification import verify

    tolerance = _number(_take(arguments, "--tolerance"), "--tolerance")
    every, quiet = _flag(arguments, "--all"), _flag(arguments, "--quiet")
    a, b = _operands(arguments, 2, "verify takes two checkpoints")
    bar = _Bar("comparing", quiet)
    try:
        found = verify(a, b, tolerance=tolerance, limit=2**62 if every else 1, progress=bar.update)
    finally:
        bar.close()
    for difference in found.differences:
        print(_one_line(difference))
    if found.equal:
        how = "bit by bit" if tolerance is None else f"within {tolerance:g}"
        print(f"equal {how}: {found.tensors} tensors, {format_size(found.nbytes)} ({found.scope})")
    return 0 if found.equal else 1


def _repair(arguments: list[str]) -> int:
    from veomni_ckpt.leftovers import repair

    (folder,) = _operands(arguments, 1, "repair takes a folder of checkpoints")
    repaired = repair(folder)
    for leftover in repaired:
        print(f"{leftover.final}: brought back")
    if not repaired:
        print(f"{folder}: nothing to repair")
    return 0


def _prune(arguments: list[str]) -> int:
    from veomni_ckpt.inspection import format_size
    from veomni_ckpt.leftovers import find_leftovers, prune

    delete = _flag(arguments, "--delete")
    (folder,) = _operands(arguments, 1, "prune takes a folder of checkpoints")
    leftovers = find_leftovers(folder)
    for leftover in leftovers:
        note = ", in use" if leftover.in_use else ", the only whole copy: use repair" if leftover.is_needed else ""
        print(f"{leftover.path}: {leftover.kind}, {format_size(leftover.nbytes)}{note}")
    chosen = prune(folder, dry_run=not delete)
    if delete:
        print(f"{len(chosen)} deleted")
    elif chosen:
        print(f"{len(chosen)} can go: give --delete")
    elif not leftovers:
        print(f"{folder}: nothing was left unfinished")
    return 0


class _Bar:
    """A progress bar on a terminal: rich's if it is installed, and only for what takes longer than a moment."""

    def __init__(self, verb: str, quiet: bool) -> None:
        self._verb = verb
        self._begin = time.monotonic()
        self._shown = 0.0
        self._off = quiet or not sys.stderr.isatty()
        self._rich: object = None

    def update(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are done."""
        now = time.monotonic()
        if self._off or now - self._begin < 1 or (now - self._shown < 0.1 and done < total):
            return
        self._shown = now
        if self._rich is None:
            self._rich = _rich_bar(self._verb, total)
        if self._rich is False:
            print(f"\r{self._verb} {100 * done // max(total, 1):3} %", end="", file=sys.stderr, flush=True)
        else:
            self._rich.update(0, completed=done)  # type: ignore[attr-defined]

    def close(self) -> None:
        """Leave the line."""
        if self._rich is False:
            print(file=sys.stderr)
        elif self._rich is not None:
            self._rich.stop()  # type: ignore[attr-defined]


def _rich_bar(verb: str, total: int) -> object:
    """A started bar of rich, or False."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return False
    columns = TextColumn(verb), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=Console(stderr=True))
    bar.add_task(verb, total=total)
    bar.start()
    return bar


def _take(arguments: list[str], option: str) -> str | None:
    """The value of an option, taken out of `arguments`; None where it is not there."""
    taken = _take_all(arguments, option)
    if len(taken) > 1:
        raise CheckpointError(f"{option} is given twice")
    return taken[0] if taken else None


def _take_all(arguments: list[str], option: str) -> list[str]:
    taken = []
    while True:
        for index, argument in enumerate(arguments):
            name, equals, value = argument.partition("=")
            if name == option:
                if not equals and index + 1 == len(arguments):
                    raise CheckpointError(f"{option} takes a value")
                taken.append(value if equals else arguments[index + 1])
                del arguments[index : index + 1 + (not equals)]
                break
        else:
            return taken


def _flag(arguments: list[str], option: str) -> bool:
    if option in arguments:
        arguments.remove(option)
        return True
    return False


def _pair(text: str, option: str) -> tuple[str, str]:
    left, equals, right = text.partition("=")
    if not equals or not left or not right:
        raise CheckpointError(f"{option} {text}: two names with = between them are expected")
    return left, right


def _number(text: str | None, option: str) -> float | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        raise CheckpointError(f"{option} {text}: a number is expected") from None


def _operands(arguments: list[str], count: int, usage: str) -> list[str]:
    if unknown := [argument for argument in arguments if argument.startswith("-") and len(argument) > 1]:
        raise CheckpointError(f"the option {unknown[0]} is unknown: see --help")
    if len(arguments) != count:
        raise CheckpointError(usage)
    return arguments
