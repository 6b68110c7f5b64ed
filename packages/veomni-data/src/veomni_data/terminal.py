"""Rows of tokens in a terminal: what is learnt in colour, or between marks where there are no colours."""

from __future__ import annotations

from typing import IO

from rich.console import Console
from rich.text import Text

from .token_view import TokenView, spans

_WIDTH_OF_A_PIPE = 160
LEARNT, SPECIAL, OTHER = "bold green", "cyan", "dim"

# what moves the cursor or changes the terminal is shown, not sent
_CONTROLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_CONTROLS |= {0x7F: "\u2421"} | dict.fromkeys(
    [*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd"
)


class _Console(Console):
    """A console that leaves it to the command what a closed pipe means."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def make_console(file: IO[str]) -> Console:
    """A console that writes text as it is: no markup, no emoji codes; colours by the terminal and NO_COLOR."""
    width = None if file.isatty() else _WIDTH_OF_A_PIPE
    return _Console(file=file, width=width, markup=False, emoji=False, highlight=False, soft_wrap=True)


def has_colours(console: Console) -> bool:
    """Whether what is learnt can be told by its colour."""
    return console.is_terminal and not console.no_color and console.color_system is not None


def legend(console: Console) -> Text:
    """One line that says how tokens are marked."""
    if has_colours(console):
        return Text.assemble(("learnt", LEARNT), "  ", ("not learnt", OTHER), "  ", ("special token", SPECIAL))
    begin, end = _marks(console)
    return Text(f"{begin}learnt{end}, the rest is not")


def tokens_as_text(console: Console, view: TokenView, most: int | None = None) -> Text:
    """The tokens of a row, at most `most` of them; a line marks where a further sample of the row begins."""
    end = len(view) if most is None else min(most, len(view))
    coloured, (begin_mark, end_mark) = has_colours(console), _marks(console)
    text, starts, marked = Text(), set(view.starts[1:]), False
    for span in spans(view, 0, end):
        if not coloured and marked and (not span.learnt or span.begin in starts):
            text.append(end_mark)
            marked = False
        if span.begin in starts:
            number = view.starts.index(span.begin) + 1
            text.append(f"\n{'-' * 8} sample {number} begins {'-' * 8}\n", "yellow" if coloured else "")
        if not coloured and span.learnt and not marked:
            text.append(begin_mark)
            marked = True
        shown = shown_text(span.text) + (f" x{span.repeats:,} " if span.repeats > 1 else "")
        text.append(shown, (LEARNT if span.learnt else SPECIAL if span.special else OTHER) if coloured else "")
    if marked:
        text.append(end_mark)
    if end < len(view):
        text.append(f"\n... {len(view) - end:,} more tokens", "yellow" if coloured else "")
    return text


def shown_text(text: str) -> str:
    """The text without characters that a terminal would obey."""
    return text.translate(_CONTROLS)


def _marks(console: Console) -> tuple[str, str]:
    try:
        "\u27e6\u27e7".encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return "[[", "]]"
    return "\u27e6", "\u27e7"
