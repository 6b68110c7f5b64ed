"""What trained models are asked: `infer`, `evaluate` and `veomni ask`, against transformers itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from veomni_recipes import cli
from veomni_recipes.chat import Speaker, talk
from veomni_recipes.evaluation import load_exported
from veomni_recipes.smoke import tiny_tokenizer
from veomni_recipes.tasks import evaluate, infer

TEXTS = ["A short one.", "Größe zählt: naïve café, 10 €.", "one two three four " * 12, "x"]
QUESTIONS = ["What is it?", "Why?", "Who said so, and when?", "Where to?"]
WINDOW = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with its tokenizer, as a run exports it."""
    folder = tmp_path_factory.mktemp("model") / "hf_ckpt"
    tokenizer = tiny_tokenizer(["Some words, a few, to learn from."], 300)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen3Config(
        **sizes, num_key_value_heads=2, head_dim=8, vocab_size=len(tokenizer), max_position_embeddings=256
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far from uniform
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plain_answer(folder: Path, prompt: str, new_tokens: int) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def chat(*turns: str) -> str:
    """ChatML, written by hand."""
    roles = ["user", "assistant"] * len(turns)
    said = "".join(f"<|im_start|>{role}\n{turn}<|im_end|>\n" for role, turn in zip(roles, turns, strict=False))
    return said + "<|im_start|>assistant\n"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_infer(folder: Path, *arguments: str) -> None:
    infer.main([f"--infer.model_path={folder}", "--infer.max_tokens=8", "--infer.do_sample=false", *arguments])


def test_prompts_of_a_file_are_answered_as_transformers_answers_them(folder: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": QUESTIONS[0]}, {"messages": [{"role": "user", "content": QUESTIONS[2]}]}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_infer(folder, f"--infer.prompts_path={tmp_path}/prompts.jsonl", f"--infer.output_path={tmp_path}/out.jsonl")
    made = lines(tmp_path / "out.jsonl")
    assert [line["answer"] for line in made] == [plain_answer(folder, chat(q), 8) for q in (QUESTIONS[0], QUESTIONS[2])]
    assert made[0]["prompt"] == QUESTIONS[0]
    assert made[1]["messages"] == rows[1]["messages"]


def test_a_text_is_continued_and_sampling_repeats_by_its_seed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_infer(folder, "--infer.prompt=Some words", "--infer.chat=false")
    assert capsys.readouterr().out.strip() == plain_answer(folder, "Some words", 8)
    drawn = []
    for seed in (1, 1, 2):
        run_infer(
            folder, "--infer.prompt=Some", "--infer.do_sample=true", "--infer.temperature=3", f"--infer.seed={seed}"
        )
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_prompt_without_a_question_is_named_by_its_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}\n')
    with pytest.raises(SystemExit) as error:
        run_infer(folder, f"--infer.prompts_path={tmp_path}/prompts.jsonl")
    assert error.value.code == 2
    assert 'prompts.jsonl:2: there is no "prompt"' in capsys.readouterr().err


def test_a_conversation_is_streamed_and_remembered(folder: Path) -> None:
    typed, shown = iter([QUESTIONS[0], QUESTIONS[1], "/new", QUESTIONS[1], ""]), []
    model, processor = load_exported(folder)
    speaker = Speaker(model, processor, options={"max_new_tokens": 6})
    talk(speaker, Path("unused"), read=lambda _: next(typed), say=lambda text, end="\n", **_: shown.append(text + end))
    answers = "".join(shown[1:])
    first = plain_answer(folder, chat(QUESTIONS[0]), 6)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(shown) > 4, "word by word"
    assert answers.startswith(first)
    (untouched,) = speaker.answer([{"prompt": QUESTIONS[0]}])
    told = plain_answer(folder, chat(QUESTIONS[0], untouched.text, QUESTIONS[1]), 6)
    assert told in answers
    assert answers.rstrip().endswith(plain_answer(folder, chat(QUESTIONS[1]), 6))
    assert tokenizer.eos_token not in answers


def test_ask_answers_for_a_text_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ask", QUESTIONS[3], "--run", str(folder.parent)]) == 0
    assert capsys.readouterr().out.strip() == plain_answer(folder, chat(QUESTIONS[3]), 512)


def true_nats(folder: Path, text: str) -> tuple[float, int]:
    """Each token alone: from its window's first token, by the whole logits."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token_id
    ids = [end, *tokenizer(text, add_special_tokens=False)["input_ids"], end]
    total = 0.0
    for place in range(1, len(ids)):
        begin = 0 if place <= WINDOW else -(-(place - WINDOW) // (WINDOW // 2)) * (WINDOW // 2)
        with torch.no_grad():
            logits = model(torch.tensor([ids[begin:place]])).logits[0, -1].double()
        total -= logits.log_softmax(-1)[ids[place]].item()
    return total, len(ids) - 1


def measure(folder: Path, data: Path, kind: str, output: Path) -> None:
    evaluate.main(
        [
            f"--evaluate.model_path={folder}",
            f"--evaluate.data_path={data}",
            f"--evaluate.data_type={kind}",
            f"--evaluate.output_dir={output}",
            f"--evaluate.max_seq_len={WINDOW}",
            "--evaluate.batch_size=3",
        ]
    )


def test_bits_per_byte_are_those_of_each_token_alone_on_any_number_of_ranks(
    folder: Path, tmp_path: Path, two_ranks: Ranks
) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    measure(folder, data, "plaintext", tmp_path / "1")
    want = [true_nats(folder, text) for text in TEXTS]
    made, scores = lines(tmp_path / "1" / "predictions.jsonl"), json.loads((tmp_path / "1/scores.json").read_text())
    assert [line["nats"] for line in made] == pytest.approx([nats for nats, _ in want], rel=1e-5)
    assert [line["tokens"] for line in made] == [tokens for _, tokens in want]
    nats, tokens = (sum(each) for each in zip(*want, strict=True))
    size = sum(len(text.encode()) for text in TEXTS)
    assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert (scores["tokens"], scores["bytes"], scores["changed_by_tokenizer"]) == (tokens, size, 0)
    assert scores["read_in_windows"] == sum(count > WINDOW for _, count in want) > 0
    two_ranks.run(measure, folder, data, "plaintext", tmp_path / "2")
    for name in ("scores.json", "predictions.jsonl"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_right_answers_are_counted_by_task(folder: Path, tmp_path: Path, two_ranks: Ranks) -> None:
    rows = []
    for number, asked in enumerate(QUESTIONS):
        right = number != 2
        said = plain_answer(folder, chat(asked), 8)
        answer = {"role": "assistant", "content": f" {said}\n" if right else "no"}
        task = {"task": "guess" if number < 3 else "place"}
        rows.append({"messages": [{"role": "user", "content": asked}, answer], **task})
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"--evaluate.model_path={folder}", f"--evaluate.data_path={data}", "--evaluate.max_tokens=8"]
    arguments += ["--evaluate.batch_size=2"]
    evaluate.main([*arguments, f"--evaluate.output_dir={tmp_path}/1"])
    scores = json.loads((tmp_path / "1" / "scores.json").read_text())
    assert scores == {
        "guess_accuracy": pytest.approx(2 / 3),
        "place_accuracy": 1.0,
        "all_accuracy": 0.75,
        "questions": 4,
    }
    assert [line["right"] for line in lines(tmp_path / "1" / "predictions.jsonl")] == [True, True, False, True]
    two_ranks.run(evaluate.main, [*arguments, f"--evaluate.output_dir={tmp_path}/2"])
    for name in ("scores.json", "predictions.jsonl"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
