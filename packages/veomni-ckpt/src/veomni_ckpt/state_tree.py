"""Nested values and tensors as JSON and safetensors: nothing in these files can run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch.distributed.tensor import DTensor

from veomni_ckpt.errors import CheckpointError

Place = list[str | int]  # keys and indices that lead from the root to a value


class StateTreeError(ValueError):
    """Files are not those that `to_files` makes."""


@dataclass
class StateTree:
    """A nested value taken apart: JSON, copies of its tensors, and where tensors and tuples belong in it."""

    value: Any = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    tensor_places: dict[str, Place] = field(default_factory=dict)
    tuple_places: list[Place] = field(default_factory=list)


def encode(value: Any, name: str) -> StateTree:
    """Take apart a nested dict / list / tuple of JSON values and plain tensors; the tensors are copied to the CPU.

    Raises:
        CheckpointError: at the first value of another kind, with its place below `name`.
    """
    tree = StateTree()

    def take(value: Any, place: Place) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise CheckpointError(
                        f"{_spell(name, place)} has the key {key!r}, a {type(key).__name__}: keys must be strings"
                    )
            return {key: take(item, [*place, key]) for key, item in value.items()}
        if isinstance(value, list | tuple):
            if isinstance(value, tuple):
                tree.tuple_places.append(place)
            return [take(item, [*place, index]) for index, item in enumerate(value)]
        if isinstance(value, torch.Tensor) and not isinstance(value, DTensor) and value.layout == torch.strided:
            key = str(len(tree.tensors))
            # in row-major order, whatever the strides were: a checkpoint keeps values, not memory layouts
            tree.tensors[key] = value.detach().to("cpu", copy=True).contiguous()
            tree.tensor_places[key] = place
            return None
        raise CheckpointError(
            f"{_spell(name, place)} is a {type(value).__name__}: only None, bool, int, float, str, list, tuple, dict "
            "and plain dense tensors can be saved"
        )

    tree.value = take(value, [])
    return tree


def to_files(tree: StateTree, name: str) -> dict[str, bytes]:
    """The contents of `name.json` and `name.safetensors`."""
    places = {"tensors": tree.tensor_places, "tuples": tree.tuple_places}
    document = json.dumps({"value": tree.value, **places}).encode()
    return {f"{name}.json": document, f"{name}.safetensors": save(tree.tensors)}


def from_files(content: Callable[[str], bytes], name: str) -> Any:
    """What `encode` was given, from the two files of `to_files`, which `content` reads.

    Raises:
        StateTreeError: they are not of this form.
    """
    try:
        document = json.loads(content(f"{name}.json"))
        # a holder above the root, so that the root itself can be replaced like any other value
        holder = [document["value"]]
        tensor_places: dict[str, Place] = document["tensors"]
        tuple_places: list[Place] = document["tuples"]
        tensors = load(content(f"{name}.safetensors"))
        for key, place in tensor_places.items():
            parent, last = _parent(holder, place)
            parent[last] = tensors[key]
        # inner tuples before outer ones: `encode` noted the outer first
        for place in reversed(tuple_places):
            parent, last = _parent(holder, place)
            parent[last] = tuple(parent[last])
    except (ValueError, KeyError, IndexError, TypeError, SafetensorError) as error:
        raise StateTreeError(str(error)) from error
    return holder[0]


def _parent(holder: list[Any], place: Place) -> tuple[Any, str | int]:
    path: Place = [0, *place]
    parent: Any = holder
    for key in path[:-1]:
        parent = parent[key]
    return parent, path[-1]


def _spell(name: str, place: Place) -> str:
    return name + "".join(f"[{key!r}]" for key in place)
