"""Talk with a trained model: prompts of its kind, one answer, or a conversation in the terminal."""

from __future__ import annotations

import mimetypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from veomni_config import ConfigError, Problem
from veomni_data import get_chat_template, multimodal_prompt
from veomni_models import OmniModel

from veomni_recipes.evaluation import Said, generate, prompt_options, save_pictures, tokenizer_of

HELP = "an empty line or Ctrl-D ends, /new begins anew"


@dataclass
class Speaker:
    """A model with its processor (or tokenizer), and how it answers.

    Attributes:
        chat: whether a prompt is a message that is answered; else a text that is continued.
        options: of `evaluation.generate`.
    """

    model: Any
    processor: Any
    chat: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    def prompt(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row with `prompt` or `messages`, and what it shows, as `generate` takes it.

        Raises:
            DataError: neither of them, a message that cannot be read, or a file that cannot be.
        """
        if not self.chat:
            return {"text": beginning(tokenizer_of(self.processor)) + str(row.get("prompt", row.get("text", "")))}
        if "messages" not in row:
            row = {**row, "messages": [{"role": "user", "content": row.get("prompt", "")}]}
        template = get_chat_template("default", tokenizer_of(self.processor))
        return multimodal_prompt(row, template=template, **prompt_options(self.processor))

    def answer(self, rows: Sequence[Mapping[str, Any]], **options: Any) -> list[Said]:
        """What the model says to each row."""
        return generate(self.model, self.processor, [*map(self.prompt, rows)], **{**self.options, **options})

    @property
    def draws(self) -> bool:
        """Whether the model draws, as which it answers all at once."""
        return isinstance(self.model, OmniModel) and bool(self.model.config.decoders)


def beginning(tokenizer: Any) -> str:
    """The token that a tokenizer puts before a text, or nothing."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token if ids and ids[0] == tokenizer.bos_token_id else ""


def question(text: str, files: Sequence[str | Path] = ()) -> dict[str, Any]:
    """A message about pictures, videos and sounds, in their order."""
    parts: list[dict[str, Any]] = [{"type": kind_of(file), kind_of(file): str(file)} for file in files]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}


def kind_of(file: str | Path) -> str:
    """What a file's name says that it is: "image", "video" or "audio"."""
    kind = (mimetypes.guess_type(file)[0] or "image").partition("/")[0]
    return kind if kind in ("video", "audio") else "image"


def talk(
    speaker: Speaker,
    drawings: Path,
    *,
    read: Callable[[str], str] = input,
    say: Callable[..., Any] = print,
) -> None:
    """A conversation in the terminal: answers appear while they are made, drawings are written into a folder.

    Args:
        speaker: who answers.
        drawings: the folder.
        read, say: of the terminal.
    """
    from transformers import TextStreamer

    class Shown(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            say(text, end="\n" if stream_end else "", flush=True)

    say(HELP)
    messages: list[dict[str, Any]] = []
    turn = 0
    while line := _line(read):
        if line == "/new":
            messages = []
            continue
        turn += 1
        messages.append(question(line))
        tokenizer = tokenizer_of(speaker.processor)
        streamer = None if speaker.draws else Shown(tokenizer, skip_prompt=True, skip_special_tokens=True)
        (said,) = speaker.answer([{"messages": messages} if speaker.chat else {"prompt": line}], streamer=streamer)
        if streamer is None:
            say(said.text.strip())
        for file in save_pictures(said.pictures, drawings, f"{turn:04d}"):
            say(f"drew {file}")
        messages.append({"role": "assistant", "content": said.text})


def _line(read: Callable[[str], str]) -> str:
    try:
        return read("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def exported_folder(run: Path) -> tuple[Path, bool]:
    """The model's folder of a run (or the folder itself), and whether it was trained on conversations.

    Raises:
        ConfigError: there is none.
    """
    folder = run / "hf_ckpt" if (run / "hf_ckpt").is_dir() else run
    if not (folder / "config.json").is_file():
        text = f"{run} holds no trained model: train one first, or name its folder with --run"
        raise ConfigError([Problem("", text)])
    config = run / "config.yaml"
    written = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return folder, (written.get("data") or {}).get("data_type") != "plaintext"
