"""A description of data as plain values, and the dataset and transform that it stands for."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .chat_template import ChatTemplate, get_chat_template
from .collators import PackingCollator, PaddingCollator, Sample
from .dataset import build_dataset
from .errors import DataError
from .files import first_line
from .layouts import normalize_example
from .multimodal import encode_multimodal_sample
from .placeholders import KINDS, Generation
from .preference import process_preference_example
from .prepared import read_manifest
from .row import Row
from .text import TEXT_COLUMNS, conversation_columns, process_pretrain_example, process_sft_example

TYPES = ("plaintext", "conversation", "multimodal", "preference")
LIMITS = (
    *("max_image_nums", "max_pixels", "max_pixel_size", "scale_factor"),
    *("fps", "max_frames", "video_max_pixels", "max_seconds"),
)
_TRIES = 20  # rows that are looked at for the type of data
_COLLATORS = {"packing": PackingCollator, "padding": PaddingCollator}


@dataclass(frozen=True)
class DataDescription:
    """What data are and how they become samples, as plain values that can be written down and read again.

    Attributes:
        path: what `build_dataset` takes.
        type: one of `TYPES`; None is found out: "multimodal" if there is a processor, else by the columns of the first
            row. A prepared folder is always "prepared".
        tokenizer: a tokenizer's folder; None if there is a processor, whose tokenizer is then used.
        processor: the folder of a transformers processor, for data with pictures, video or sound.
        register: "MODULE:FUNCTION", each called without arguments before the processor is loaded, so that classes of
            the user's own are known to `AutoProcessor`.
        positions: "MODULE:FUNCTION" that makes of a sample its position ids, see `encode_multimodal_sample`.
        chat_template: the name of a template, or a Jinja source.
        max_seq_len: tokens of a row; plain text is cut into samples of at most so many.
        kind: "mapping" or "iterable", as for `build_dataset`.
        root: the folder that files named in rows may not leave.
        columns: our names of columns to the row's, see `normalize_example`.
        text_keys, image_keys, video_keys, audio_keys: columns of other names than usual, see
            `encode_multimodal_sample`.
        limits: its limits, such as `{"max_pixels": 602112, "fps": 1.0}`.
        generation_ratio: share of pairs of a picture and a text in which the picture is drawn, likewise.
        shuffle_buffer: of a stream, as for `build_dataset`.
        collator: "packing" or "padding", with which micro-batches were made; None is the loader's own choice.
        pad_token_id: of the collator.
    """

    path: str | list[str]
    type: str | None = None
    tokenizer: str | None = None
    processor: str | None = None
    register: list[str] = field(default_factory=list)
    positions: str | None = None
    chat_template: str = "default"
    max_seq_len: int | None = None
    kind: str = "mapping"
    root: str | None = None
    columns: dict[str, str] | None = None
    text_keys: str | None = None
    image_keys: str | None = None
    video_keys: str | None = None
    audio_keys: str | None = None
    limits: dict[str, float] = field(default_factory=dict)
    generation_ratio: float = 0.0
    shuffle_buffer: int = 256
    collator: str | None = None
    pad_token_id: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The description as plain values, without those that are as if not given."""
        plain = dataclasses.asdict(DataDescription(""))
        return {key: value for key, value in dataclasses.asdict(self).items() if key == "path" or value != plain[key]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataDescription:
        """What `to_dict` gave; DataError if it has a key that a description has not."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise DataError(f"a description of data has no {unknown}: its keys are {sorted(known)}")
        if "path" not in values:
            raise DataError('a description of data needs its "path"')
        return cls(**values)


@dataclass(frozen=True)
class Pipeline:
    """What a description stands for.

    Attributes:
        description: with its `type` found out.
        rows: the dataset without a transform: its rows know their `place`.
        transform: a row into a sample or a list of samples.
        tokenizer: of the samples' tokens; None for prepared data whose tokenizer is not there.
        processor: None without one.
    """

    description: DataDescription
    rows: Any
    transform: Callable[[Row], Any]
    tokenizer: Any
    processor: Any

    def dataset(self) -> Any:
        """The dataset with the transform, for `build_dataloader`."""
        return open_dataset(self.description, self.transform)

    def collator(self, packing: bool) -> PackingCollator | PaddingCollator:
        """What makes micro-batches of samples, for a loader with or without packing."""
        name = self.description.collator or ("packing" if packing else "padding")
        if name not in _COLLATORS:
            raise DataError(f'"{name}" is no collator: there are {", ".join(_COLLATORS)}')
        return _COLLATORS[name](self.description.pad_token_id)

    def read(self, numbers: Iterable[int] | None = None) -> Iterator[Row | DataError]:
        """Rows by their numbers, or all; for one that is broken, its error."""
        if numbers is None and self.description.kind == "mapping":
            numbers = range(len(self.rows))
        rows = iter(self.rows) if numbers is None else map(self.rows.__getitem__, numbers)
        while True:
            try:
                yield next(rows)
            except StopIteration:
                return
            except DataError as error:  # both kinds of iterators go on behind it
                yield error

    def encode(self, row: Row) -> list[Sample]:
        """The samples of a row; a DataError names its file and line."""
        try:
            made = self.transform(row)
        except DataError as error:
            raise DataError(f"{row.place}: {error}", reason=error.reason) from error
        except ImportError:  # its sentence stays the last one
            raise
        except Exception as error:
            error.add_note(f"while encoding {row.place}")
            raise
        return made if isinstance(made, list) else [made]


def build_pipeline(description: DataDescription) -> Pipeline:
    """The dataset, tokenizer or processor, and transform of a description.

    Raises:
        DataError: there is nothing at a path, a folder holds no tokenizer, the type does not fit the rest, and so on.
    """
    manifest = _prepared_manifest(description.path)
    rows = open_dataset(dataclasses.replace(description, shuffle_buffer=0))  # as they lie in the files
    if manifest is not None:
        return _prepared_pipeline(description, manifest, rows)
    kind = description.type
    if kind is None:
        kind = "multimodal" if description.processor else _type_of(rows, description)
    if kind not in TYPES:
        raise DataError(f'"{kind}" is not a type of data: there are {", ".join(TYPES)}')
    description = dataclasses.replace(description, type=kind)
    tokenizer, processor = _load(description)
    return Pipeline(description, rows, _transform(description, tokenizer, processor), tokenizer, processor)


def _prepared_pipeline(description: DataDescription, manifest: Mapping[str, Any], rows: Any) -> Pipeline:
    """The pipeline of a prepared folder, whose rows need nothing; a tokenizer only shows them."""
    given = description.tokenizer or description.processor
    tokenizer = None
    if given is not None:
        tokenizer = load_tokenizer(given)
    else:
        given = manifest["description"].get("tokenizer") or manifest["description"].get("processor")
        if given is not None and Path(given).is_dir():  # it may be on another machine
            tokenizer = load_tokenizer(given)
    description = dataclasses.replace(
        description,
        type="prepared",
        tokenizer=given,
        processor=None,
        max_seq_len=manifest["description"]["max_seq_len"],
    )
    return Pipeline(description, rows, _as_it_is, tokenizer, None)


def open_dataset(description: DataDescription, transform: Callable[[Row], Any] | None = None) -> Any:
    """The dataset of a description; its rows as they are without a transform."""
    return build_dataset(
        description.path,
        kind=description.kind,
        transform=transform,
        root=description.root,
        shuffle_buffer=description.shuffle_buffer,
    )


def _prepared_manifest(path: str | Sequence[str]) -> dict[str, Any] | None:
    return read_manifest(path) if isinstance(path, str) and Path(path).is_dir() else None


def _type_of(rows: Any, description: DataDescription) -> str:
    """The type of data by the columns of the first row that can be read."""
    row, columns = _first(rows), description.columns or {}
    if isinstance(row.get(description.text_keys or ""), str) or "text" in columns:
        return "plaintext"
    try:
        normal = normalize_example(row, conversation_columns(description.text_keys or "messages", columns))
    except DataError as error:
        if any(row.get(key) is not None for key in TEXT_COLUMNS):
            return "plaintext"
        raise DataError(f"{row.place}: {error}", reason=error.reason) from error
    return "preference" if "chosen" in normal else "conversation"


def _first(rows: Any) -> Row:
    iterator = iter(range(len(rows))) if hasattr(rows, "__len__") else iter(rows)
    broken: DataError | None = None
    for _ in range(_TRIES):
        try:
            found = next(iterator)
            return rows[found] if isinstance(found, int) else found
        except StopIteration:
            break
        except DataError as error:
            broken = broken or error
    raise DataError(f"the type of data is not to be seen in the first rows: {broken or 'there is none'}")


def _load(description: DataDescription) -> tuple[Any, Any]:
    """The tokenizer, and the processor or None."""
    if description.processor is not None:
        processor = load_processor(description.processor, description.register)
        return processor.tokenizer, processor
    if description.type == "multimodal":
        raise DataError("multimodal data need the folder of a processor")
    if description.tokenizer is None:
        raise DataError("text needs the folder of a tokenizer")
    return load_tokenizer(description.tokenizer), None


def load_tokenizer(folder: str) -> Any:
    """The tokenizer of a folder (or hub id); DataError if there is none that can be loaded."""
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, folder, "tokenizer")


def load_processor(folder: str, register: Sequence[str] = ()) -> Any:
    """The processor of a folder (or hub id), after these functions were called; DataError if it cannot be loaded.

    Args:
        register: "MODULE:FUNCTION", called without arguments. Only ever what a user typed: importing a module runs it.
    """
    for name in register:
        _function(name)()
    from transformers import AutoProcessor

    processor = _from_pretrained(AutoProcessor, folder, "processor")
    if not hasattr(processor, "tokenizer"):  # AutoProcessor takes what part of one there is
        raise DataError(
            f"{folder} holds a {type(processor).__name__} but no processor: name it as the tokenizer, or give the "
            f"function that registers the processor's class"
        )
    return processor


def _from_pretrained(auto: Any, folder: str, what: str) -> Any:
    if (folder.startswith((".", "/", "~")) or folder.count("/") != 1) and not Path(folder).expanduser().is_dir():
        raise DataError(f"{folder} does not exist: it should be the folder of a {what}")
    try:
        return auto.from_pretrained(str(Path(folder).expanduser()), trust_remote_code=False)
    except Exception as error:  # a folder can be wrong in many ways
        raise DataError(f"{folder} holds no {what} that transformers can load: {first_line(error)}") from error


def _function(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{name} cannot be imported as MODULE:FUNCTION: {reason}") from error
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise DataError(f"{name} is a {type(found).__name__}: MODULE:FUNCTION names a function")
    return found


def _transform(description: DataDescription, tokenizer: Any, processor: Any) -> Callable[[Row], Any]:
    """The transform; only plain text is cut by it, as what becomes of longer samples is said elsewhere."""
    columns: dict[str, Any] = {"columns": description.columns} if description.columns else {}
    if description.text_keys:
        columns["text_keys"] = description.text_keys
    if description.type == "plaintext":
        return partial(process_pretrain_example, tokenizer=tokenizer, max_seq_len=description.max_seq_len, **columns)
    template = _template(description.chat_template, tokenizer)
    encode: Callable[[Mapping[str, Any]], Sample]
    if processor is None:
        encode = partial(process_sft_example, tokenizer=tokenizer, template=template)
    else:
        # a processor of a model that draws says how
        drawn = getattr(processor, "generation", None)
        generation = Generation(**drawn) if drawn else None
        drawing = {"generation": generation, "generation_ratio": description.generation_ratio}
        media = {**drawing, **_media(description)}
        encode = partial(encode_multimodal_sample, processor=processor, template=template, **media)
    if description.type == "preference":
        return partial(process_preference_example, encode=encode, columns=description.columns)
    return partial(encode, **columns)


def _media(description: DataDescription) -> dict[str, Any]:
    """Arguments of `encode_multimodal_sample` for pictures, video and sound."""
    keys = {f"{kind}_keys": getattr(description, f"{kind}_keys") for kind in KINDS}
    given: dict[str, Any] = {key: value for key, value in keys.items() if value is not None}
    if unknown := sorted(set(description.limits) - set(LIMITS)):
        raise DataError(f"{unknown[0]} is no limit: there are {', '.join(LIMITS)}")
    if description.positions is not None:
        given["position_ids"] = _function(description.positions)
    return {**given, **description.limits}


def _template(name: str, tokenizer: Any) -> ChatTemplate:
    return ChatTemplate(name, tokenizer) if "{" in name else get_chat_template(name, tokenizer)


def _as_it_is(value: Any) -> Any:
    return value


def run_workers(tasks: Any, workers: int, order: Sequence[Any]) -> Iterator[Any]:
    """`tasks[n]` for each n of `order`, in that order, made by worker processes or, with 0, by this one.

    Raises:
        DataError: a worker died.
    """
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(tasks, sampler=order, batch_size=None, num_workers=workers, collate_fn=_as_it_is)
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(f"a worker process died (out of memory?): {first_line(error)}") from error
