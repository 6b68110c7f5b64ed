"""Samples and packed rows as one page that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from itertools import pairwise
from typing import Any, NamedTuple

from .media import Medium
from .token_view import TokenView, spans

_TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class ShownSample:
    """A sample with where it comes from.

    Attributes:
        title: its file and line.
        tokens: what the model sees.
        source: the name of its source, if there are several.
        media: what it shows and plays.
        tensors: further inputs of the model, name to shape and type.
        row: the row as text.
    """

    title: str
    tokens: TokenView
    source: str | None = None
    media: list[Medium] = field(default_factory=list)
    tensors: dict[str, str] = field(default_factory=dict)
    row: str | None = None


@dataclass(frozen=True)
class ShownRow:
    """A row of a batch: samples side by side.

    Attributes:
        title: which row it is.
        tokens: those of all samples.
        capacity: the most tokens that it could hold.
        names: of its samples.
        tensors, media: as of a sample.
    """

    title: str
    tokens: TokenView
    capacity: int
    names: list[str]
    tensors: dict[str, str] = field(default_factory=dict)
    media: list[Medium] = field(default_factory=list)


class _Stripe(NamedTuple):
    """A run of tokens in the bar of a row: its share of the capacity in percent."""

    width: float
    learnt: bool
    begins: bool  # a sample begins with it
    title: str


def render_page(
    title: str,
    facts: Mapping[str, str],
    samples: Sequence[ShownSample],
    rows: Sequence[ShownRow],
    broken: Sequence[str] = (),
) -> str:
    """An HTML page. Nothing of the data is markup in it, and it loads nothing from elsewhere.

    Args:
        facts: what stands under the title, name to value.
        broken: rows that give no sample, and why.
    """
    import jinja2

    source = resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    return template.render(
        title=title,
        facts=facts,
        samples=samples,
        rows=[(row, list(_stripes(row))) for row in rows],
        broken=broken,
        token_runs=_token_runs,
    )


def tensor_shapes(sample: Mapping[str, Any]) -> dict[str, str]:
    """The shape and type of each tensor of a sample or batch, and the other values as text."""
    shapes = {}
    for key, value in sample.items():
        if hasattr(value, "shape"):
            shapes[key] = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        else:
            text = str(value)
            shapes[key] = text if len(text) <= 80 else f"{text[:77]}..."
    return shapes


def _token_runs(view: TokenView) -> Iterator[dict[str, Any]]:
    """What the page shows of a row: runs of tokens that look the same, each with its tokens."""
    starts = {start: number for number, start in enumerate(view.starts)}
    for span in spans(view):
        if span.repeats > 1:
            tokens = [(f"{span.begin}-{span.end - 1}: {view.ids[span.begin]}", span.text, span.repeats)]
        else:
            tokens = [(f"{at}: {view.ids[at]}", view.texts[at], 1) for at in range(span.begin, span.end)]
        number = starts.get(span.begin)
        yield {
            "begins": 0 if number is None else number + 1,
            "kind": "learnt" if span.learnt else "special" if span.special else "other",
            "tokens": tokens,
        }


def _stripes(row: ShownRow) -> Iterator[_Stripe]:
    """The bar of a row."""
    learnt, starts = row.tokens.learnt, set(row.tokens.starts)
    edges = [at for at in range(len(learnt)) if at in starts or learnt[at] != learnt[at - 1]]
    sample = -1
    for begin, end in pairwise([*edges, len(learnt)]):
        sample += begin in starts
        name = row.names[sample] if sample < len(row.names) else f"sample {sample + 1}"
        yield _Stripe(100 * (end - begin) / row.capacity, learnt[begin], begin in starts, name)
