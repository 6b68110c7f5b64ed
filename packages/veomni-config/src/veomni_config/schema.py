"""The keys of a configuration class: which there are, what each allows, which is the nearest to a misspelt one."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .node import Key, Node

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
    type(None): "null",
    Any: "any value",
}

# what other programs call our keys
_OTHER_NAMES = {
    "learning_rate": "lr",
    "min_lr": "lr_min",
    "warmup_ratio": "lr_warmup_ratio",
    "lr_scheduler_type": "lr_decay_style",
    "gradient_accumulation_steps": "global_batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_checkpointing": "enable_gradient_checkpointing",
    "max_length": "max_seq_len",
    "epochs": "num_train_epochs",
    "model_name_or_path": "model_path",
    "resume_from_checkpoint": "load_checkpoint_path",
}

_LISTS = (list, tuple, set, frozenset)


@dataclass(frozen=True, slots=True)
class ConfigKey:
    """One key that a file may hold."""

    path: tuple[str, ...]
    field: FieldInfo

    @property
    def dotted(self) -> str:
        """As a user writes it: `train.lr`."""
        return ".".join(self.path)

    @property
    def legacy(self) -> str | None:
        """Why the key has no effect; None for all that have one."""
        extra = self.field.json_schema_extra
        return str(extra["legacy"]) if isinstance(extra, dict) and "legacy" in extra else None


def section_class(annotation: Any) -> type[BaseModel] | None:
    """The section that a field of this annotation holds, None for a field that holds a value."""
    for part in _arms(annotation):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def config_keys(cls: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[ConfigKey]:
    """All keys of `cls` in the order of its definition, sections followed."""
    for name, field in cls.model_fields.items():
        section = section_class(field.annotation)
        if section is None:
            yield ConfigKey((*path, name), field)
        else:
            yield from config_keys(section, (*path, name))


def find_key(cls: type[BaseModel], path: tuple[Key, ...]) -> ConfigKey | None:
    """The key at `path` or, where it leads into a mapping that a key holds, that key."""
    for depth, name in enumerate(path):
        field = cls.model_fields.get(str(name))
        if field is None:
            return None
        section = section_class(field.annotation)
        if section is None:
            return ConfigKey(tuple(str(part) for part in path[: depth + 1]), field)
        cls = section
    return None


def nearest_key(cls: type[BaseModel], path: tuple[Key, ...]) -> str | None:
    """The dotted key that `path` most likely stands for: the same name in another section, or a similar one."""
    *parents, name = (part for each in path for part in str(each).split("."))
    known = [key.dotted for key in config_keys(cls)]
    if len(path) < 2:
        known += dict.fromkeys(key.path[0] for key in config_keys(cls) if len(key.path) > 1)
    beside = [key for key in known if key.split(".")[:-1] == parents]
    name = _OTHER_NAMES.get(name, name)
    same = next((key for key in known if key.split(".")[-1] == name), None)
    return same or nearest(name, beside) or nearest(name, known)


def nearest(name: str, keys: Iterable[str], cutoff: float = 0.75) -> str | None:
    """The first of the dotted `keys` whose last part is the nearest to `name`; None where none is near."""
    by_name: dict[str, str] = {}
    for key in keys:
        by_name.setdefault(key.rpartition(".")[2], key)
    found = difflib.get_close_matches(name, by_name, 1, cutoff)
    return by_name[found[0]] if found else None


def allowed(field: FieldInfo) -> str:
    """What a key allows, in words: `whole number >= 1, or null`."""
    return _allowed(field.annotation, field.metadata)


def _allowed(annotation: Any, metadata: Any = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _allowed(arguments[0], (*arguments[1:], *metadata))
    if origin in (Union, types.UnionType):
        words = [_allowed(part, metadata if part is not type(None) else ()) for part in arguments]
        return ", or ".join(words)
    if choices := _choices(annotation):
        return ", ".join("null" if part is None else str(part) for part in choices)
    if origin is tuple and arguments[-1:] != (...,):
        return f"list of {', '.join(_allowed(part) for part in arguments)}"
    if origin in _LISTS:
        return f"list of {_allowed(arguments[0])}"
    if annotation in _LISTS:
        return "list"
    if origin is dict or annotation is dict:
        names = f" with the keys {_allowed(arguments[0])}" if arguments and get_origin(arguments[0]) is Literal else ""
        return f"mapping{names}"
    word = _WORDS.get(annotation) or str(getattr(annotation, "__name__", annotation))
    return f"{word}{_bounds(metadata)}" if annotation in (int, float, str) else word


def _bounds(metadata: Any) -> str:
    bounds: list[str] = []
    for item in _flat(metadata):
        if isinstance(item, Ge):
            bounds.append(f">= {item.ge}")
        elif isinstance(item, Gt):
            bounds.append(f"> {item.gt}")
        elif isinstance(item, Le):
            bounds.append(f"<= {item.le}")
        elif isinstance(item, Lt):
            bounds.append(f"< {item.lt}")
        elif isinstance(item, MinLen) and item.min_length == 1:
            bounds.append("that is not empty")
    return "".join(f" {bound}" if index == 0 else f" and {bound}" for index, bound in enumerate(bounds))


def _flat(metadata: Any) -> Iterator[Any]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _flat(item.metadata)
        else:
            yield item


def is_list(field: FieldInfo) -> bool:
    """Whether a key holds a list."""
    return any(get_origin(part) in _LISTS or part in _LISTS for part in _arms(field.annotation))


def is_switch(field: FieldInfo) -> bool:
    """Whether a key is true or false."""
    return bool in _arms(field.annotation)


def is_optional(field: FieldInfo) -> bool:
    """Whether a key may be null."""
    return type(None) in _arms(field.annotation)


def words_of(field: FieldInfo) -> list[str]:
    """The words that a key allows, where it is a choice."""
    return [str(word) for arm in _arms(field.annotation) for word in _choices(arm)]


def fit(node: Node, annotation: Any, words: str) -> Node:
    """`node` as a key of this annotation, which allows what `words` say, takes it.

    A plain scalar stays the text that was written where text is wanted (`007`), and true or false is no number.
    """
    arms = _arms(annotation)
    if node.problem or Any in arms:
        return node
    if isinstance(node.value, list):
        items = next((get_args(arm) for arm in arms if get_origin(arm) in _LISTS and get_args(arm)), (Any,))
        own = len(items) if items[-1] is not ... else 1  # places of a tuple that have a type of their own
        parts = [fit(part, items[index if index < own else 0], words) for index, part in enumerate(node.value)]
        return Node(parts, node.origin)
    if isinstance(node.value, dict):
        value = next((get_args(arm)[1] for arm in arms if get_origin(arm) is dict), Any)
        return Node({key: fit(part, value, words) for key, part in node.value.items()}, node.origin)
    if node.value is None or isinstance(node.value, str) or _takes(arms, node.value):
        return node
    wants_text = any(arm in (str, Path) or _has_words(arm) for arm in arms)
    if wants_text and node.text is not None:
        return Node(node.text, node.origin)
    if isinstance(node.value, bool) and {int, float} & set(arms):
        word = "true" if node.value else "false"
        return Node(node.value, node.origin, problem=f"{word} given; allowed: {words}")
    return node


def _takes(arms: list[Any], value: bool | int | float) -> bool:
    return any(
        type(value) is arm
        or (type(value) is int and arm is float)
        or any(value is part or (type(value) is type(part) and value == part) for part in _choices(arm))
        for arm in arms
    )


def _has_words(annotation: Any) -> bool:
    return any(isinstance(part, str) for part in _choices(annotation))


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The values of a `Literal` or an enumeration."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    is_enum = isinstance(annotation, type) and issubclass(annotation, Enum)
    return tuple(member.value for member in annotation) if is_enum else ()


def _arms(annotation: Any) -> list[Any]:
    """The alternatives of a union, annotations stripped."""
    if get_origin(annotation) is Annotated:
        return _arms(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [arm for part in get_args(annotation) for arm in _arms(part)]
    return [annotation]
