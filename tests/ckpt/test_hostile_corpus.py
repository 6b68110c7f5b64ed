"""More than 500 hostile or mangled files: none runs anything, none takes 1 GB or 10 s, each ends in one sentence."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)

MB = 2**20

# runs each folder through both commands, within 1 GB of memory and 10 s, and tells what came of it
CHILD = """
import json, resource, signal, sys, time
from pathlib import Path
import veomni_ckpt
from veomni_ckpt import CheckpointError, dcp_to_hf, inspect
inspect, dcp_to_hf  # imported before the limit is set
import veomni_ckpt.scratch
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
def late(*_): raise TimeoutError("more than 10 s")
signal.signal(signal.SIGALRM, late)
for name in json.load(sys.stdin):
    folder = Path(name)
    answers = []
    for command in (inspect, lambda path: dcp_to_hf(path, folder.parent / "out" / folder.name)):
        signal.alarm(10)
        try:
            command(folder)
            answers.append(["fine", ""])
        except CheckpointError as error:
            answers.append(["refused", str(error)])
        except BaseException as error:
            answers.append([type(error).__name__, str(error)[:300]])
        signal.alarm(0)
    print(json.dumps(answers), flush=True)
"""


class Touch:
    """Unpickled by a trusting reader, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def code(module: str, name: str, argument: str) -> dict[str, bytes]:
    """Every way in which a pickle can ask for a call."""
    call = f"{module}\n{name}\n".encode()
    text = short(argument)
    return {
        "GLOBAL": b"c" + call + text + b"\x85R.",
        "STACK_GLOBAL": b"\x80\x04" + short(module) + short(name) + b"\x93" + text + b"\x85R.",
        "INST": b"(" + text + b"i" + call + b".",
        "OBJ": b"(c" + call + text + b"o.",
        "NEWOBJ": b"\x80\x02c" + call + text + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04c" + call + text + b"\x85}\x92.",
        "dotted": b"\x80\x04" + short("torch") + short(f"{module}.{name}") + b"\x93" + text + b"\x85R.",
        "BUILD": b"c" + call + text + b"\x85R}b.",
    }


def bombs() -> Iterator[tuple[str, bytes]]:
    """Pickles that would take memory, time or the stack."""
    huge = (2**31 - 1, 2**31, 2**32 - 1)
    yield "memo index of 2^26", b"Nr\x00\x00\x00\x04."
    for number in huge:
        yield f"memo index {number}", b"Nr" + struct.pack("<I", number) + b"."
        yield f"reference {number}", b"j" + struct.pack("<I", number) + b"."
        yield f"text of {number}", b"X" + struct.pack("<I", number) + b"a."
        yield f"bytes of {number}", b"B" + struct.pack("<I", number) + b"a."
        yield f"number of {number} bytes", b"\x8b" + struct.pack("<i", number & 0x7FFFFFFF) + b"a."
    for number in (2**33, 2**40, 2**63):
        yield f"long text of {number}", b"\x80\x04\x8d" + struct.pack("<Q", number) + b"a."
        yield f"frame of {number}", b"\x80\x04\x95" + struct.pack("<Q", number) + b"N."
        yield f"bytearray of {number}", b"\x80\x05\x96" + struct.pack("<Q", number) + b"a."
    yield "out-of-band buffer", b"\x80\x05\x97."
    yield "read-only buffer", b"\x80\x05\x97\x98."
    for name, opcode in (("EXT1", b"\x82\x01"), ("EXT2", b"\x83\x01\x00"), ("EXT4", b"\x84\x01\x00\x00\x00")):
        yield name, b"\x80\x02" + opcode + b"."
    yield "persistent id", b"N\x51."
    yield "text persistent id", b"Pevil\n."
    yield "duplicates", b"N" + b"2" * (4 * MB) + b"t."
    for name, opcode in (("lists", b"]"), ("dicts", b"}"), ("tuples", b")\x85"), ("marks", b"("), ("nones", b"N")):
        yield f"a stack of {name}", opcode * (4 * MB) + b"."
    yield "lists kept by the memo", b"]\x94" * (2 * MB) + b"."
    yield "dicts in a list", b"](" + b"}" * (2 * MB) + b"e."
    yield "dicts in a list, handed over singly", b"]" + b"}a" * MB + b"."
    yield "nested tuples", b")" + b"\x85" * MB + b"."
    yield "nested lists", b"]" * MB + b"a" * (MB - 1) + b"."
    yield "nested lists by the memo", b"]" + b"".join(b"\x94]h%ca" % min(n, 255) for n in range(5_000)) + b"."
    yield "tuples of all that came before", b")" + b"\x94h\x00h\x00\x87" * 100_000 + b"."
    yield "a list in itself", b"]\x94h\x00a."
    yield "a tuple as a key", b"}K\x01\x85Ns."
    yield (
        "numbers as keys",
        b"}(" + b"".join(b"\x8a\x09" + (k * (2**61 - 1)).to_bytes(9, "little") + b"N" for k in range(1, 127)) + b"u.",
    )
    yield "a large shape", b"ctorch\nSize\n(" + b"K\x01" * 30_000 + b"t\x85R."
    yield "a negative shape", b"ctorch\nSize\nJ\xff\xff\xff\xff\x85\x85R."
    yield "a call of a text", short("os.system") + b")R."
    yield "an instance of a text", short("os.system") + b")\x81."
    yield "a state for nothing", b"N}b."
    yield "POP beyond the bottom", b"0."
    yield "a tuple of more than there is", b"N\x87."
    yield "an unmatched tuple", b"t."
    yield "protocol 9", b"\x80\x09N."
    yield "a text that is no UTF-8", b"\x8c\x02\xff\xfe."
    yield "floats", b"G" + bytes(8) + b"."
    yield "text numbers", b"I1\n."
    yield "long text numbers", b"L" + b"9" * (4 * MB) + b"L\n."
    yield "nothing", b""
    yield "no pickle", b"hello" * 100


def small_checkpoint(folder: Path) -> None:
    state = {"model": {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(5).bfloat16()}, "epoch": 3}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)


def lies() -> Iterator[tuple[str, Callable[[Metadata], None]]]:
    """Changes to honest metadata that would lead a trusting reader astray."""

    def info(metadata: Metadata) -> Any:
        return next(value for key, value in metadata.storage_data.items() if key.fqn == "model.a")

    def entry(metadata: Metadata) -> Any:
        return metadata.state_dict_metadata["model.a"]

    names = (
        "../secret",
        "/etc/passwd",
        "",
        ".",
        "..",
        "a/../../b",
        "nul\0",
        "absent.distcp",
        "x" * 300,
        "\\\\host\\x",
        "..\\x",
    )
    for name in names:
        yield f"file {name!r}", lambda metadata, name=name: setattr(info(metadata), "relative_path", name)
    for field, value in (
        *(("offset", value) for value in (-1, 2**40, 2**62, 2**63 - 1, 1, 7, None, "0", 1.5)),
        *(("length", value) for value in (-1, 0, 1, 10, 2**40, 2**63 - 1, None, "0")),
        *(("relative_path", value) for value in (None, 7, ("a",))),
        *(
            ("transform_descriptors", value)
            for value in (["stream.zstd/1"], ["evil/9"], [7], "text", ["stream.zstd/1"] * 9)
        ),
    ):
        yield f"{field}={value!r}", lambda metadata, f=field, v=value: setattr(info(metadata), f, v)
    for shape in ((2**62, 4), (2**62, 2**62), (4, 3), (12,), (3, 4, 1), (0, 4), (3, 5), (2, 4), (1,) * 65):
        yield f"shape {shape[:3]}", lambda metadata, shape=shape: setattr(entry(metadata), "size", torch.Size(shape))
    for shape in ([3, 4], "3x4", None, (3.0, 4.0), ("3", "4")):
        yield f"size {shape!r}", lambda metadata, shape=shape: setattr(entry(metadata), "size", shape)
    for dtype in (torch.float64, torch.int32, torch.complex128, torch.bool):
        yield f"{dtype}", lambda metadata, d=dtype: setattr(entry(metadata), "properties", TensorProperties(dtype=d))
    chunk = ChunkStorageMetadata
    for boxes in (
        [],
        [((0, 0), (3, 3))],
        [((0, 1), (3, 4))],
        [((0, 0), (2, 4)), ((1, 0), (1, 4))],
        [((0, 0), (2, 4)), ((1, 0), (2, 4))],
        [((0, 0), (3, 4)), ((0, 0), (3, 4))] * 2 + [((1, 1), (1, 1))],
        [((0,), (12,))],
        [((0, 0), (2**62, 2**62))],
        [((2**62, 0), (3, 4))],
        [((0, 0), (3, 2)), ((0, 2), (3, 2))],
    ):
        made = [chunk(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes]
        yield f"chunks {boxes}", lambda metadata, made=made: setattr(entry(metadata), "chunks", made)
    for chunks in (None, "text", {"a": 1}, [None], [7], [chunk(None, None)], [chunk([0, 0], [3, 4])]):
        yield f"chunks {chunks!r:.40}", lambda metadata, chunks=chunks: setattr(entry(metadata), "chunks", chunks)
    yield "no places", lambda metadata: setattr(metadata, "storage_data", None)
    yield "empty places", lambda metadata: setattr(metadata, "storage_data", {})
    yield "places as a list", lambda metadata: setattr(metadata, "storage_data", [1])
    yield "places of texts", lambda metadata: setattr(metadata, "storage_data", {"a": "b"})
    yield "no tensors", lambda metadata: setattr(metadata, "state_dict_metadata", None)
    yield "tensors as texts", lambda metadata: setattr(metadata, "state_dict_metadata", {"a": "b"})
    yield "a tensor without properties", lambda metadata: setattr(entry(metadata), "properties", None)
    yield "an unnamed place", lambda metadata: metadata.storage_data.update({MetadataIndex(7): _StorageInfo("x", 0, 1)})  # type: ignore[arg-type]
    yield "places swapped", _swap_places


def _swap_places(metadata: Metadata) -> None:
    keys = [key for key in metadata.storage_data if key.fqn.startswith("model.")]
    values = [metadata.storage_data[key] for key in keys]
    metadata.storage_data.update(zip(keys, reversed(values), strict=True))


def mangled(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Cut, flipped, doubled, shortened and mixed up, each at a place of chance."""
    chance = random.Random(seed)
    for number in range(count):
        at, other = sorted(chance.randrange(len(data)) for _ in range(2))
        kind = number % 6
        if kind == 0:
            yield data[:at]
        elif kind == 1:
            yield data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]
        elif kind == 2:
            yield data[:at] + chance.randbytes(chance.randrange(1, 9)) + data[at:]
        elif kind == 3:
            yield data[:at] + data[other:]
        elif kind == 4:
            yield data[:at] + data[at:other] * 2 + data[other:]
        else:
            yield data[:at] + chance.randbytes(min(8, len(data) - at)) + data[at + 8 :]


def safetensors_lies() -> Iterator[tuple[str, bytes]]:
    def file(header: bytes, data: bytes = bytes(48), length: int | None = None) -> bytes:
        return struct.pack("<Q", len(header) if length is None else length) + header + data

    def one(**changes: Any) -> bytes:
        return json.dumps({"a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48], **changes}}).encode()

    yield "empty", b""
    yield "short", b"\x01"
    for length in (10**6, 2**32, 2**63, 2**64 - 1, 0, 3):
        yield f"header of {length}", file(one(), length=length)
    for header in (
        b"{",
        b"[]",
        b"7",
        b"null",
        b"\xff\xfe",
        b'{"a": 7}',
        b'{"a": {}}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
    ):
        yield f"header {header[:12]!r}", file(header)
    for changes in (
        *({"shape": shape} for shape in ([3, 5], [2**62, 2**62], [-3, -4], [3.0, 4], "34", None, [[3], 4], [1] * 99)),
        *(
            {"data_offsets": place}
            for place in ([0, 47], [48, 0], [-48, 0], [0, 2**62], [1, 49], [0], None, ["0", "48"])
        ),
        *({"dtype": dtype} for dtype in ("F33", None, 7, ["F32"], "os.system")),
    ):
        yield f"{changes!r:.60}", file(one(**changes))
    two = {name: {"dtype": "F32", "shape": [12], "data_offsets": [0, 48]} for name in "ab"}
    yield "overlap", file(json.dumps(two).encode())
    yield "data left over", file(one(), bytes(64))
    yield "data missing", file(one(), bytes(40))


def honest(folder: Path) -> None:
    """What must be read, so that a reader that refuses everything does not pass."""
    small_checkpoint(folder)


def corpus(root: Path, proof: Path) -> Iterator[tuple[str, Path, bool]]:
    """(what, folder, whether it may be read after all) of every case."""
    base = root / "base"
    small_checkpoint(base)
    metadata_bytes, shard = (base / ".metadata").read_bytes(), (base / "__0_0.distcp").read_bytes()
    number = 0

    def folder(metadata: bytes | None = None, data: bytes | None = None) -> Path:
        nonlocal number
        number += 1
        made = root / f"case{number}"
        made.mkdir()
        (made / ".metadata").write_bytes(metadata_bytes if metadata is None else metadata)
        (made / "__0_0.distcp").write_bytes(shard if data is None else data)
        return made

    for module, name in (
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("subprocess", "call"),
        ("torch", "load"),
    ):
        for way, payload in code(module, name, f"touch {proof}").items():
            yield f"{way} {module}.{name}", folder(payload), False
    for protocol in range(6):
        yield f"os.system, protocol {protocol}", folder(pickle.dumps(Touch(proof), protocol)), False
        hidden = Metadata({}, planner_data={"a": Touch(proof)})
        yield f"os.system in planner data, protocol {protocol}", folder(pickle.dumps(hidden, protocol)), False
        item = pickle.dumps(Touch(proof), protocol)
        yield f"os.system for an item, protocol {protocol}", folder(data=item + bytes(len(shard))), False
    for name, payload in bombs():
        yield name, folder(payload), False
    for name, change in lies():
        metadata = dcp.FileSystemReader(base).read_metadata()
        change(metadata)
        # splitting in two what is stored as one is the only one of these that inspect alone cannot see
        yield name, folder(pickle.dumps(metadata)), False
    for number_, data in enumerate(mangled(metadata_bytes, 160, 1)):
        yield f"mangled metadata {number_}", folder(data), True
    for number_, data in enumerate(mangled(shard, 120, 2)):
        yield f"mangled shard {number_}", folder(data=data), True
    # the item of model.a replaced by a pickle that calls
    evil = torch.serialization.io.BytesIO()
    torch.save(Touch(proof), evil)
    metadata = dcp.FileSystemReader(base).read_metadata()
    place = next(value for key, value in metadata.storage_data.items() if key.fqn == "model.a")
    place.offset, place.length = len(shard), len(evil.getvalue())
    yield "os.system in the item of a tensor", folder(pickle.dumps(metadata), shard + evil.getvalue()), False

    fifo = folder()
    (fifo / "__0_0.distcp").unlink()
    os.mkfifo(fifo / "__0_0.distcp")
    yield "a pipe for a file", fifo, False
    device = folder()
    (device / "__0_0.distcp").unlink()
    (device / "__0_0.distcp").symlink_to("/dev/zero")
    yield "a device for a file", device, False

    for name, content in safetensors_lies():
        number += 1
        made = root / f"case{number}"
        made.mkdir()
        (made / "model.safetensors").write_bytes(content)
        yield f"safetensors {name}", made, False
    save_file({"a": torch.zeros(3, 4)}, base / "good.safetensors")
    good = (base / "good.safetensors").read_bytes()
    for number_, data in enumerate(mangled(good, 60, 3)):
        number += 1
        made = root / f"case{number}"
        made.mkdir()
        (made / "model.safetensors").write_bytes(data)
        yield f"mangled safetensors {number_}", made, True
    for name, index in (
        ("outside", {"weight_map": {"a": "../base/good.safetensors"}}),
        ("absolute", {"weight_map": {"a": "/etc/passwd"}}),
        ("a list", []),
        ("no names", {"weight_map": {"a": 7}}),
        ("no map", {}),
        ("the folder itself", {"weight_map": {"a": "."}}),
        ("no name", {"weight_map": {"a": ""}}),
        ("a zero byte", {"weight_map": {"a": "a\0b"}}),
        ("a name of 100,000 letters", {"weight_map": {"a": "a" * 100_000}}),
        ("a tensor that is not there", {"weight_map": {"b": "good.safetensors"}}),
    ):
        number += 1
        made = root / f"case{number}"
        made.mkdir()
        (made / "model.safetensors.index.json").write_text(json.dumps(index))
        (made / "good.safetensors").write_bytes(good)
        yield f"index {name}", made, False
    number += 1
    made = root / f"case{number}"
    made.mkdir()
    (made / "model.safetensors.index.json").write_text('{"weight_map":' * 50_000)
    yield "index nested deeply", made, False


@pytest.mark.timeout(600)
def test_hostile_and_mangled_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    proof = tmp_path / "owned"
    (tmp_path / "cases").mkdir()
    cases = list(corpus(tmp_path / "cases", proof))
    assert len(cases) >= 500
    folders = [str(path) for _, path, _ in cases] + [str(tmp_path / "cases" / "base")]
    run = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps(folders), capture_output=True, text=True, check=False
    )
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(answers) == len(folders), run.stderr[-2000:]
    assert not proof.exists()
    *answers, of_honest = answers
    assert [kind for kind, _ in of_honest] == ["fine", "fine"]

    faults = []
    for (what, path, may_be_read), (inspected, converted) in zip(cases, answers, strict=True):
        for kind, message in (inspected, converted):
            if kind not in ("fine", "refused"):
                faults.append(f"{what}: {kind}: {message}")
            if kind == "refused" and ("\n" in message or path.name not in message or not message.isprintable()):
                faults.append(f"{what}: not one sentence that names the file: {message!r}")
        if converted[0] == "fine" and not may_be_read:
            faults.append(f"{what}: was converted")
        if converted[0] == "refused" and (tmp_path / "cases" / "out" / path.name).exists():
            faults.append(f"{what}: left something behind")
    assert not faults, "\n".join(faults)
    refused = sum(converted[0] == "refused" for _, converted in answers)
    assert refused >= 400
