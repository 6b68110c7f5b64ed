"""The figures of data as tables for a terminal and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .errors import DataError
from .stats import Array, Stats
from .terminal import shown_text

_BINS = 12
_WIDE = 20  # the longest to the shortest, from which on lengths are drawn on a logarithmic scale
_BAR = 40  # characters of the longest bar
_LEARNT, _OTHER, _ACCENT = "#2a9d5c", "#9aa4ae", "#3b6fb6"


def stats_tables(stats: Stats) -> Group:
    """The figures as tables."""
    return Group(*_tables(stats))


def _tables(stats: Stats) -> Iterator[RenderableType]:
    tokens, targets = int(stats.lengths.sum()), int(stats.targets.sum())
    broken = sum(count for count, _ in stats.skipped.values())
    yield Text(
        f"{stats.rows:,} rows, {len(stats.lengths):,} samples, {tokens:,} tokens, of which {targets:,} "
        f"({targets / max(tokens, 1):.1%}) are learnt; {broken:,} rows are broken",
        "bold",
    )
    yield _lengths(stats)
    yield _histogram(stats.lengths)
    if len(stats.sources) > 1:
        yield _sources(stats, tokens)
    yield _modalities(stats, tokens)
    yield _fillings(stats, tokens)
    if stats.skipped:
        yield _skipped(stats)


def draw_stats(stats: Stats, path: Path, title: str) -> None:
    """Four charts into a picture: lengths, modalities, sources, and how well rows are filled.

    Raises:
        DataError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError as error:
        raise DataError("a picture needs matplotlib: pip install 'veomni-data[plot]'") from error

    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title.replace("$", r"\$"), fontsize=13, fontweight="bold")
    lengths, modalities, sources, filling = figure.subplots(2, 2).flat

    learnt = stats.targets[stats.targets > 0]
    edges = _edges(np.concatenate([stats.lengths, learnt]), 48)
    lengths.hist(stats.lengths, bins=edges, color=_OTHER, label="all tokens")
    lengths.hist(learnt, bins=edges, histtype="step", linewidth=1.8, color=_LEARNT, label="learnt")
    logarithmic = edges[-1] / edges[0] >= _WIDE
    lengths.set(xscale="log" if logarithmic else "linear", xlabel="tokens of a sample", ylabel="samples")
    lengths.set_title("Lengths")
    lengths.xaxis.set_major_formatter(_thousands)
    lengths.yaxis.set_major_formatter(_thousands)
    lengths.legend(frameon=False)

    _bars(modalities, {name: n for name, (n, _) in stats.modalities.items()}, "Modalities", "samples")
    shares = {name or "all": values[1] for name, values in stats.sources.items()}
    _bars(sources, shares, "Tokens of each source", "tokens")

    names = [f"{f.row_length:,}" for f in stats.fillings]
    for label, colour, values in (
        ("whole list packed", _LEARNT, [f.whole for f in stats.fillings]),
        ("streamed", _ACCENT, [f.stream for f in stats.fillings]),
        ("one sample a row", _OTHER, [f.padded for f in stats.fillings]),
    ):
        filling.plot(names, values, "o-", color=colour, label=label)
    filling.set(ylim=(0, 1.05), xlabel="tokens of a row", title="How full rows are")
    filling.yaxis.set_major_formatter(PercentFormatter(1.0))
    filling.legend(frameon=False, loc="center right")
    filling.grid(axis="y", alpha=0.3)
    for axes in (lengths, modalities, sources, filling):
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: a kind of picture that matplotlib does not write
        raise DataError(f"{path} cannot be written: {error}") from error


def _bars(axes: Any, values: dict[str, int], title: str, unit: str) -> None:
    """Bars from the largest on, each with its share."""
    names = sorted(values, key=lambda name: values[name])[-20:]
    total = max(sum(values.values()), 1)
    bars = axes.barh([_shortened(name) for name in names], [values[name] for name in names], color=_ACCENT, height=0.6)
    axes.bar_label(bars, [f"{values[name]:,} ({values[name] / total:.1%})" for name in names], padding=4)
    axes.set(title=title, xlabel=unit)
    axes.set_xlim(0, max(values.values()) * 1.5)
    axes.set_ylim(-0.5 - max(0, 3 - len(names)) / 2, len(names) - 0.5 + max(0, 3 - len(names)) / 2)
    axes.xaxis.set_major_formatter(_thousands)
    axes.locator_params(axis="x", nbins=4)


def _thousands(value: float, _: Any) -> str:
    return f"{value:,.0f}"


def _lengths(stats: Stats) -> Table:
    table = _table("", *(f"p{p}" for p in (5, 25, 50, 75, 95, 99)), "mean", "longest")
    for name, values in (("tokens of a sample", stats.lengths), ("learnt of these", stats.targets)):
        cells = [f"{np.percentile(values, p):,.0f}" for p in (5, 25, 50, 75, 95, 99)]
        table.add_row(name, *cells, f"{values.mean():,.1f}", f"{values.max():,}")
    return table


def _histogram(lengths: Array) -> Table:
    edges = _edges(lengths, _BINS)
    counts, _ = np.histogram(lengths, edges)
    table = _table("tokens", "samples", "")
    table.columns[2].justify = "left"
    for begin, end, count in zip(edges, edges[1:], counts, strict=False):
        first, last = int(np.ceil(begin)), int(np.ceil(end)) - 1
        if last >= first:
            table.add_row(f"{first:,} - {last:,}", f"{count:,}", "#" * round(_BAR * count / max(counts.max(), 1)))
    return table


def _sources(stats: Stats, tokens: int) -> Table:
    table = _table("source", "samples", "tokens", "share", "learnt")
    for name, (n, count, learnt) in sorted(stats.sources.items(), key=lambda item: -item[1][1]):
        table.add_row(shown_text(name) or "-", f"{n:,}", f"{count:,}", f"{count / max(tokens, 1):.1%}", f"{learnt:,}")
    return table


def _modalities(stats: Stats, tokens: int) -> Table:
    table = _table("modality", "samples", "tokens", "share of tokens")
    for name, (n, count) in stats.modalities.items():
        table.add_row(name, f"{n:,}", f"{count:,}", f"{count / max(tokens, 1):.1%}")
    return table


def _fillings(stats: Stats, tokens: int) -> Table:
    table = _table("tokens of a row", "rows", "full: packed", "streamed", "unpacked", "longer samples (of tokens)")
    for f in stats.fillings:
        longer = f"{f.too_long:,} ({f.too_long_tokens / tokens:.1%})" if f.too_long else "-"
        table.add_row(
            f"{f.row_length:,}", f"{f.rows:,}", f"{f.whole:.2%}", f"{f.stream:.2%}", f"{f.padded:.2%}", longer
        )
    return table


def _skipped(stats: Stats) -> Table:
    table = _table("broken: reason", "rows", "the first")
    table.columns[2].justify = "left"
    for reason, (count, first) in stats.skipped.items():
        table.add_row(reason, f"{count:,}", shown_text(first))
    return table


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", title="")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    table.columns[0].justify = "left"
    return table


def _edges(lengths: Array, bins: int) -> npt.NDArray[np.float64]:
    """Whole edges of bins that are equally wide, or grow by one factor where lengths differ much."""
    low, high = max(int(lengths.min()), 1), int(lengths.max()) + 1
    if high - low <= bins:
        return np.arange(low, high + 1.0)
    even = np.geomspace if high / low >= _WIDE else np.linspace
    return np.unique(even(low, high, bins + 1).round())


def _shortened(name: str) -> str:
    short = name if len(name) <= 30 else f"{name[:14]}...{name[-13:]}"
    return short.replace("$", r"\$")  # which would begin a formula
