"""The command line of `veomni-data`: its options and its help."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

USER_ERROR = 2

Command = Callable[[argparse.Namespace], int | None]

_ABOUT = "Look at data, count them, prepare them, and prove what a run did with them."

_INSPECT = """\
examples:
  veomni-data inspect train.jsonl --tokenizer models/qwen3
  veomni-data inspect train.jsonl --processor models/qwen3-vl -n 5 --html look.html
  veomni-data inspect sums.csv --tokenizer models/qwen3 --column prompt=question --column completion=answer

In a terminal, what is learnt is green; on a pipe, or with NO_COLOR set, it stands between marks.
"""

_STATS = """\
examples:
  veomni-data stats train.jsonl --tokenizer models/qwen3
  veomni-data stats mix.yaml --tokenizer models/qwen3 --row-lengths 4096,8192 --png stats.png
  veomni-data stats train.jsonl --tokenizer models/qwen3 --json | jq .packing
"""

_PREPARE = """\
examples:
  veomni-data prepare train.jsonl prepared/ --tokenizer models/qwen3 --max-seq-len 8192 --workers 8
  veomni-data inspect prepared/

The bytes of OUT depend on the data and the settings, not on --workers. If it is killed, the same command goes on where
it was; OUT can be read once it is whole. A loader takes its rows as they are: build_dataset("prepared/").
"""


_AUDIT = """\
examples:
  veomni-data audit outputs/run
  veomni-data audit outputs/run --read-data

Exit code 1: something was repeated or left out. Of a stream the order is not known from the ledger alone: --read-data
reads it through once.
"""

_REPLAY = """\
examples:
  veomni-data replay outputs/run --step 1200
  veomni-data replay outputs/run --step 1200 --rank 3 --html step.html --out step.safetensors

How the data became tokens stands in the ledger of the run; an option here goes before it. Functions that the run called
(--register, --positions) have to be named again: nothing is imported because a file says so.
OUT holds the tensors as NUMBER.KEY (.safetensors), or the list of micro-batches (.pt, for torch.load).
"""


class _Parser(argparse.ArgumentParser):
    """A mistake on the command line is one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: {message} (see {self.prog} --help)\n")


def make_parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser of `veomni-data`; it sets `command` to the function of the command that was given, or to None."""
    parser = _Parser(prog="veomni-data", description=_ABOUT)
    parser.set_defaults(command=None)
    added = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)

    inspect = _command(added, "inspect", commands["inspect"], "show samples as the model sees them", _INSPECT)
    _data_path(inspect)
    inspect.add_argument("-n", "--count", type=_at_least(1), default=3, help="samples to show (default 3)")
    inspect.add_argument("--start", type=_at_least(0), default=0, metavar="ROW", help="begin with this row, from 0")
    inspect.add_argument("--random", type=_at_least(0), metavar="SEED", help="take rows at random")
    inspect.add_argument(
        "--max-tokens", type=_at_least(1), default=1000, help="of a sample in the terminal (default 1000)"
    )
    inspect.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page with pictures, sound, video and packed rows"
    )

    _stream_option(_data_options(inspect))

    stats = _command(added, "stats", commands["stats"], "lengths, modalities, sources, packing and broken rows", _STATS)
    _data_path(stats)
    stats.add_argument(
        "--row-lengths", type=_lengths, default=[], metavar="N,N", help="work out how full rows of these lengths get"
    )
    stats.add_argument(
        "--buffer-size", type=_at_least(1), default=200, help="samples that a stream is packed from (default 200)"
    )
    stats.add_argument("--limit", type=_at_least(1), metavar="ROWS", help="read so many rows, spread over all")
    stats.add_argument("--png", type=Path, metavar="FILE", help="draw the figures")
    stats.add_argument("--json", action="store_true", help="print JSON instead of tables")
    _workers(stats)
    _stream_option(_data_options(stats))

    prepare = _command(added, "prepare", commands["prepare"], "tokenise and pack once, into Arrow files", _PREPARE)
    _data_path(prepare)
    prepare.add_argument("out", type=Path, metavar="OUT", help="a new folder, or one that this began")
    prepare.add_argument(
        "--too-long",
        default="drop",
        choices=("drop", "truncate", "split"),
        help="what becomes of samples that are longer than a row (default drop); plain text is always split",
    )
    prepare.add_argument(
        "--rows-per-part",
        type=_at_least(1),
        metavar="ROWS",
        help="input rows that a file is made of, and that a worker holds (default 8192, multimodal 512)",
    )
    order = prepare.add_mutually_exclusive_group()
    order.add_argument("--seed", type=_at_least(0), default=0, help="of the order of the input rows (default 0)")
    order.add_argument("--in-order", action="store_true", help="keep the order of the input rows")
    prepare.add_argument(
        "--max-skipped", type=_share, default=0.01, metavar="SHARE", help="of rows that may be broken (default 0.01)"
    )
    _workers(prepare)
    _data_options(prepare, needs_length=True)

    audit = _command(added, "audit", commands["audit"], "prove that a run repeated no sample and left none out", _AUDIT)
    audit.add_argument("run", type=Path, metavar="RUN", help="the folder of a run, or of its ledger")
    audit.add_argument("--read-data", action="store_true", help="read the data too, as the order of a stream needs")
    audit.add_argument("--data", dest="path", metavar="PATH", help="where the data are now, if not where they were")

    replay = _command(added, "replay", commands["replay"], "show or save the exact batch of a step of a run", _REPLAY)
    replay.add_argument("run", type=Path, metavar="RUN", help="the folder of a run, or of its ledger")
    replay.add_argument("--step", type=_at_least(1), required=True, help="of the run, from 1")
    replay.add_argument("--rank", type=_at_least(0), default=0, help="among the data-parallel ranks (default 0)")
    replay.add_argument("--data", dest="path", metavar="PATH", help="where the data are now, if not where they were")
    replay.add_argument("--out", type=Path, metavar="FILE", help="save the micro-batches: .safetensors or .pt")
    replay.add_argument("--html", type=Path, metavar="FILE", help="write a page with the rows and what they show")
    replay.add_argument("--max-tokens", type=_at_least(1), default=1000, help="of a row in the terminal (default 1000)")
    _stream_option(_data_options(replay))
    return parser


def _command(commands: Any, name: str, run: Command, summary: str, epilog: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=run)
    return parser


def _data_options(parser: argparse.ArgumentParser, *, needs_length: bool = False) -> argparse._ArgumentGroup:
    """The options that say what data are."""
    what = parser.add_argument_group("how the data become tokens")
    what.add_argument("--tokenizer", metavar="FOLDER", help="of a tokenizer, for text")
    what.add_argument("--processor", metavar="FOLDER", help="of a processor, for pictures, video and sound")
    what.add_argument(
        "--register",
        action="append",
        metavar="MODULE:FUNCTION",
        help="called before the processor is loaded, to make a class known to AutoProcessor",
    )
    what.add_argument(
        "--type",
        choices=("plaintext", "conversation", "multimodal", "preference"),
        help="found out by the columns if not given",
    )
    what.add_argument("--chat-template", metavar="NAME|FILE", help="a name, or a .jinja file (default: its own)")
    what.add_argument(
        "--max-seq-len", type=_at_least(1), metavar="TOKENS", required=needs_length, help="tokens of a row"
    )
    what.add_argument("--text-keys", metavar="COLUMN", help="the column of the text or the conversation")
    for kind, name in (("image", "pictures"), ("video", "videos"), ("audio", "sounds")):
        what.add_argument(f"--{kind}-keys", metavar="COLUMN", help=f"the column of the {name}")
    what.add_argument(
        "--column",
        action="append",
        type=_pair,
        dest="columns",
        metavar="OURS=THEIRS",
        help="what a column is called in these data; may be repeated",
    )
    what.add_argument(
        "--limit-media",
        action="append",
        type=_limit,
        dest="limits",
        metavar="LIMIT=NUMBER",
        help="max_pixels, max_image_nums, max_pixel_size, scale_factor, fps, max_frames, video_max_pixels or "
        "max_seconds; may be repeated",
    )
    what.add_argument(
        "--positions",
        metavar="MODULE:FUNCTION",
        help="that makes of a sample its position ids [3, T], for models with M-RoPE",
    )
    what.add_argument("--root", metavar="FOLDER", help="that files which rows name may not leave")
    return what


def _stream_option(what: argparse._ArgumentGroup) -> None:
    what.add_argument(
        "--stream",
        action="store_const",
        const="iterable",
        dest="kind",
        help="read the data as a stream (also .gz and .zst)",
    )


def _data_path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        metavar="PATH",
        help="a file, a folder, a glob, a comma-separated list of these, an fsspec URL, a hub id, a multisource .yaml, "
        "or a folder that `veomni-data prepare` wrote (which needs no --tokenizer)",
    )


def _workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=_at_least(0), default=0, help="processes that encode (default: this one)")


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        try:
            value = int(text.replace("_", ""))
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= {least}")
        return value

    return number


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to 1")
    return value


def _lengths(text: str) -> list[int]:
    return [_at_least(1)(part) for part in text.split(",")]


def _limit(text: str) -> tuple[str, float]:
    name, value = _pair(text)
    try:
        number = float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not LIMIT=NUMBER") from None
    return name, int(number) if number == int(number) else number


def _pair(text: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not (ours and equals and theirs):
        raise argparse.ArgumentTypeError(f"{text!r} is not OURS=THEIRS")
    return ours, theirs
