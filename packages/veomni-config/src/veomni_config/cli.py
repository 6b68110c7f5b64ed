"""The command `veomni-config`."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pydantic import BaseModel

from .check import Further
from .diff import diff_configs
from .distill import DistillRecipeConfig
from .dit import DitRecipeConfig
from .errors import ConfigError, Problem
from .json_schema import file_schema
from .migrate import migrate
from .omni import OmniRecipeConfig, VLRecipeConfig
from .parse import ConfigWarning, Resolved, resolve, unknown_keys
from .preference import DPORecipeConfig
from .recipe import EvaluateRecipeConfig, InferRecipeConfig, RecipeConfig
from .reference import reference_page
from .show import show_config
from .validate import further_problems
from .yaml_reader import decode, read_file

USAGE = """\
usage: veomni-config COMMAND

  validate FILE [--section.key value ...] [--world-size N]   check all that can be known before a device is taken
  show FILE [--section.key value ...]                        the resolved values, and where each came from
  diff A B                                                   what two files or run folders differ in (exit code 1)
  migrate FILE [--output FILE]                               rewrite a file of the newer, nested layout
  schema                                                     JSON Schema for editors
  reference                                                  Markdown page of all keys

validate, show, diff and schema take --recipe text|omni|vl|dit|dpo|distill|infer|evaluate|MODULE:CLASS. Without it the
first of these that knows all keys of the file is taken; schema takes text.
"""

RECIPES: dict[str, type[BaseModel]] = {
    "text": RecipeConfig,
    "omni": OmniRecipeConfig,
    "vl": VLRecipeConfig,
    "dit": DitRecipeConfig,
    "dpo": DPORecipeConfig,
    "distill": DistillRecipeConfig,
    "infer": InferRecipeConfig,
    "evaluate": EvaluateRecipeConfig,
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0, 1 (`diff`: they differ) or 2 (one sentence for each mistake on standard error)."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know all characters
    arguments = sys.argv[1:] if argv is None else list(argv)
    commands = {
        "validate": _validate,
        "show": _show,
        "diff": _diff,
        "migrate": _migrate,
        "schema": _schema,
        "reference": _reference,
    }
    if arguments[:1] == ["help"] or {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return 0
    command: Callable[[list[str]], int] | None = commands.get(arguments[0]) if arguments else None
    if command is None:
        wrong = f"veomni-config: {arguments[0]!r} is no command\n" if arguments else ""
        print(wrong + USAGE, end="", file=sys.stderr)
        return 2
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConfigWarning)
            code = command(arguments[1:])
        for warning in caught:
            print(f"warning: {warning.message}", file=sys.stderr)
        sys.stdout.flush()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # `veomni-config show ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"veomni-config: {error}", file=sys.stderr)
        return 2
    return code


def _validate(arguments: list[str]) -> int:
    text = _take(arguments, "--world-size")
    if text is not None and not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise _usage(f"--world-size {text}: a whole number >= 1 is allowed")
    world_size = None if text is None else int(text)
    recipe, resolved = _load(arguments, partial(further_problems, world_size=world_size))
    line = f"{arguments[0]}: valid ({recipe})"
    if world_size is not None:
        if not isinstance(resolved.config, RecipeConfig):
            raise _usage("--world-size is for the configuration of a training")
        plan = resolved.config.batch_plan(world_size)
        line += "".join(f"\n  {name}: {value}" for name, value in dataclasses.asdict(plan).items())
    print(line)
    return 0


def _show(arguments: list[str]) -> int:
    print(show_config(_load(arguments)[1]), end="")
    return 0


def _diff(arguments: list[str]) -> int:
    recipe = _take(arguments, "--recipe")
    if len(arguments) != 2:
        raise _usage("diff takes two files")
    option = ["--recipe", recipe] if recipe else []
    lines = diff_configs(_load([arguments[0], *option])[1], _load([arguments[1], *option])[1])
    print("".join(f"{line}\n" for line in lines), end="")
    return 1 if lines else 0


def _migrate(arguments: list[str]) -> int:
    output = _take(arguments, "--output")
    if len(arguments) != 1:
        raise _usage("migrate takes one file")
    path = Path(arguments[0])
    migration = migrate(decode(path.read_bytes(), str(path)), str(path))
    if output is None:
        print(migration.text, end="")
    else:
        Path(output).write_text(migration.text, encoding="utf-8")
    print(
        "".join(f"{line}\n" for line in migration.report) or f"{path}: has no key of the newer layout\n",
        end="",
        file=sys.stderr,
    )
    return 0


def _schema(arguments: list[str]) -> int:
    cls = _recipe(_take(arguments, "--recipe") or "text")
    _no_more(arguments)
    print(json.dumps(file_schema(cls), indent=2))
    return 0


def _reference(arguments: list[str]) -> int:
    _no_more(arguments)
    print(reference_page(), end="")
    return 0


def _load(arguments: list[str], further: Further = lambda *_: ()) -> tuple[str, Resolved[BaseModel]]:
    """The recipe's name and the configuration; a run folder stands for the `config.yaml` in it."""
    recipe = _take(arguments, "--recipe")
    if not arguments or arguments[0].startswith("--"):
        raise _usage("a YAML file is expected first")
    path = Path(arguments[0])
    argv = [str(path / "config.yaml" if path.is_dir() else path), *arguments[1:]]
    written = read_file(argv[0])
    if recipe is None:
        recipe = min(RECIPES, key=lambda name: unknown_keys(RECIPES[name], argv, written))
    return recipe, resolve(_recipe(recipe), argv, further, written)


def _recipe(name: str) -> type[BaseModel]:
    if name in RECIPES:
        return RECIPES[name]
    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise _usage(f"--recipe {name}: {reason}; allowed: {', '.join(RECIPES)}, or MODULE:CLASS") from None
    finally:
        sys.path.pop(0)
    if not (isinstance(found, type) and issubclass(found, BaseModel) and found.model_fields):
        raise _usage(f"--recipe {name}: not a configuration class")
    return found


def _take(arguments: list[str], option: str) -> str | None:
    """The value of an option of this command, taken out of `arguments`; None where it is not there."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == option:
            if not equals and index + 1 == len(arguments):
                raise _usage(f"{option} takes a value")
            taken = value if equals else arguments[index + 1]
            del arguments[index : index + 1 + (not equals)]
            return taken
    return None


def _no_more(arguments: list[str]) -> None:
    if arguments:
        raise _usage(f"{arguments[0]!r} is not understood here")


def _usage(text: str) -> ConfigError:
    return ConfigError([Problem("", f"veomni-config: {text}")])
