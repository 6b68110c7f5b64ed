"""The command `veomni-data`: look at data, count them, prepare them, and prove what a run did with them."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command_line import USER_ERROR, Command, make_parser
from .errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

    from .html_page import ShownRow
    from .inspection import Inspection
    from .pipeline import DataDescription
    from .token_view import TokenView

WRONG = 1
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0, 1 (`audit`: something is wrong), 2 (one sentence on standard error) or 130 (interrupted)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may not know all characters
    parser = make_parser(
        {"inspect": _inspect, "stats": _stats, "prepare": _prepare, "audit": _audit, "replay": _replay}
    )
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return USER_ERROR
    command: Command = arguments.command
    try:
        with _quiet_libraries():
            code = command(arguments) or 0
        sys.stdout.flush()
    except DataError as error:
        print(f"veomni-data: {error}", file=sys.stderr)
        return USER_ERROR
    except BrokenPipeError:  # `veomni-data inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        print(f"veomni-data: {(what.strip() or type(error).__name__).splitlines()[-1]}", file=sys.stderr)
        return USER_ERROR
    except ImportError as error:  # a package that is optional; many lines if from a worker
        print(f"veomni-data: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("veomni-data: interrupted", file=sys.stderr)
        return INTERRUPTED
    return code


def _describe(arguments: argparse.Namespace, base: DataDescription) -> DataDescription:
    """The description that the options give; where they say nothing, that of `base`."""
    given: dict[str, Any] = {}
    for field in dataclasses.fields(base):
        value = getattr(arguments, field.name, None)
        if value is not None:
            given[field.name] = dict(value) if field.name in ("columns", "limits") else value
    template = given.get("chat_template")
    if template is not None and template.endswith((".jinja", ".jinja2", ".j2")):
        given["chat_template"] = Path(template).read_text(encoding="utf-8")
    return dataclasses.replace(base, **given)


def _given_data(arguments: argparse.Namespace) -> DataDescription:
    from .pipeline import DataDescription

    return _describe(arguments, DataDescription(arguments.path))


def _inspect(arguments: argparse.Namespace) -> None:
    from .inspection import inspect_data
    from .pipeline import build_pipeline
    from .terminal import legend, make_console, shown_text

    pipeline = build_pipeline(_given_data(arguments))
    with _progress("encoding") as progress:
        found = inspect_data(
            pipeline,
            count=arguments.count,
            start=arguments.start,
            seed=arguments.random,
            packed=arguments.html is not None,
            progress=progress,
        )
    console = make_console(sys.stdout)
    console.print(legend(console))
    for sample in found.samples:
        media = "".join(f"\n  {m.kind}: {m.label}" + (f" ({m.problem})" if m.problem else "") for m in sample.media)
        _print_tokens(console, sample.title + media, sample.tokens, arguments.max_tokens)
    if not found.samples:  # rows that are packed already
        for row in found.rows:
            _print_row(console, row, arguments.max_tokens)
    for sentence in found.broken:
        console.print(shown_text(f"\nbroken: {sentence}"))
    if arguments.html is not None:
        _write_page(arguments.html, str(pipeline.description.path), pipeline.description, found)


def _write_page(path: Path, title: str, description: DataDescription, found: Inspection) -> None:
    from .html_page import render_page
    from .prepare import write_whole

    facts = {
        "data": str(description.path),
        "type": str(description.type),
        "tokenizer": description.processor or description.tokenizer or "",
        **({"chat template": description.chat_template} if "{" not in description.chat_template else {}),
        **({"row length": f"{description.max_seq_len:,}"} if description.max_seq_len else {}),
    }
    page = render_page(title, facts, found.samples, found.rows, found.broken)
    write_whole(path, page.encode("utf-8", "backslashreplace"))
    print(f"wrote {path}", file=sys.stderr)


def _print_tokens(console: Console, title: str, view: TokenView, most: int) -> None:
    from .terminal import shown_text, tokens_as_text

    console.print()
    first, *rest = title.split("\n")
    console.print(f"--- {shown_text(first)}", style="bold")
    for line in rest:
        console.print(shown_text(line))
    console.print(tokens_as_text(console, view, most))
    console.print(f"{len(view):,} tokens, {view.targets:,} learnt")


def _print_row(console: Console, row: ShownRow, most: int) -> None:
    samples = "".join(f"\n  sample {number}: {name}" for number, name in enumerate(row.names, 1))
    title = f"{row.title}: {len(row.tokens.starts)} samples in {row.capacity:,} tokens"
    _print_tokens(console, title + samples, row.tokens, most)


def _stats(arguments: argparse.Namespace) -> None:
    from .pipeline import build_pipeline
    from .stats import collect_stats

    pipeline = build_pipeline(_given_data(arguments))
    given = [arguments.max_seq_len] if arguments.max_seq_len else []
    with _progress("counting") as progress:
        stats = collect_stats(
            pipeline,
            row_lengths=sorted({*arguments.row_lengths, *given}) if arguments.row_lengths or given else None,
            buffer_size=arguments.buffer_size,
            limit=arguments.limit,
            workers=arguments.workers,
            progress=progress,
        )
    if arguments.json:
        print(json.dumps(stats.to_dict(), indent=2))
    else:
        from .stats_report import stats_tables
        from .terminal import make_console

        make_console(sys.stdout).print(stats_tables(stats))
    if arguments.png is not None:
        from .stats_report import draw_stats

        draw_stats(stats, arguments.png, str(arguments.path))
        print(f"wrote {arguments.png}", file=sys.stderr)


def _prepare(arguments: argparse.Namespace) -> None:
    from .prepare import SKIPPED, prepare

    with _progress("preparing") as progress:
        manifest = prepare(
            _given_data(arguments),
            arguments.out,
            too_long=arguments.too_long,
            rows_per_part=arguments.rows_per_part,
            seed=None if arguments.in_order else arguments.seed,
            workers=arguments.workers,
            max_skipped=arguments.max_skipped,
            progress=progress,
        )
    longer = [f"{manifest[how]:,} longer ones {how}" for how in ("dropped", "truncated", "split") if manifest[how]]
    broken = sum(manifest["skipped"].values())
    if broken:
        longer.append(f"{broken:,} broken rows in {arguments.out / SKIPPED}")
    print(
        f"{arguments.out}: {manifest['rows']:,} rows of {arguments.max_seq_len:,} tokens, {manifest['fullness']:.2%} "
        f"full, of {manifest['samples']:,} samples{''.join(f'; {part}' for part in longer)}"
    )


def _audit(arguments: argparse.Namespace) -> int:
    from .audit import audit
    from .pipeline import open_dataset

    data = open_dataset(_run_data(arguments)) if arguments.read_data else None
    report = audit(arguments.run, data)
    print(report)
    if not report.ok:
        return WRONG
    proven = not any(epoch.unproven for epoch in report.epochs)
    print("no sample was repeated" + (", and none left out" if proven else ""))
    return 0


def _replay(arguments: argparse.Namespace) -> None:
    from .inspection import Inspection, replay_step
    from .pipeline import build_pipeline
    from .terminal import legend, make_console

    pipeline = build_pipeline(_run_data(arguments))
    batches, rows = replay_step(
        pipeline, arguments.run, arguments.step, arguments.rank, media=arguments.html is not None
    )
    console = make_console(sys.stdout)
    console.print(legend(console))
    for row in rows:
        _print_row(console, row, arguments.max_tokens)
        for key, shape in row.tensors.items():
            console.print(f"  {key}: {shape}")
    if arguments.html is not None:
        title = f"{arguments.run}: step {arguments.step}, rank {arguments.rank}"
        _write_page(arguments.html, title, pipeline.description, Inspection(rows=rows))
    if arguments.out is not None:
        from .prepare import write_whole
        from .replay_file import batches_as_file

        write_whole(arguments.out, batches_as_file(batches, arguments.out.suffix))
        print(f"wrote {arguments.out}", file=sys.stderr)


def _run_data(arguments: argparse.Namespace) -> DataDescription:
    """What the ledger of a run says of its data, under what the options say."""
    from .ledger import read_ledger
    from .pipeline import DataDescription

    ledger = read_ledger(arguments.run)
    values = ledger.manifest.get("description")
    if not values:
        if arguments.path is None:
            raise DataError(f"{ledger.folder} does not say what its data are: give --data and how they become tokens")
        values = {"path": arguments.path}
    described = DataDescription.from_dict(values)
    for option in ("register", "positions"):
        named = getattr(described, option)
        if named and hasattr(arguments, option) and getattr(arguments, option) is None:
            text = " ".join(f"--{option} {name}" for name in ([named] if isinstance(named, str) else named))
            raise DataError(f"the data of this run were read with functions of its own: give {text} to call them")
    return _describe(arguments, described)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int | None], None] | None]:
    """A progress bar on standard error, if that is a terminal; called with what is done, and of how much."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Without the warnings and progress bars that libraries write into the output of a command."""
    import logging
    import warnings

    loggers = [logging.getLogger(name) for name in ("transformers", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


if __name__ == "__main__":
    sys.exit(main())
