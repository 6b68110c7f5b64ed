"""What a user gets to read for a mistake: all mistakes at once, each with its place and what would be right."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from veomni_config import ConfigError, RecipeConfig, TrainConfig, parse_args

BASE = "model:\n  config_path: cfg\ndata:\n  train_path: data.parquet\ntrain:\n  output_dir: out\n"


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def problems(text: str, *arguments: str, cls: Any = RecipeConfig) -> list[str]:
    Path("run.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        parse_args(cls, ["run.yaml", *arguments])
    return str(caught.value).split("\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lr_decay_styl: cosine", "train.lr_decay_styl: unknown key, did you mean train.lr_decay_style?"),
        ("max_seq_len: 1", "train.max_seq_len: unknown key, did you mean data.max_seq_len?"),
        ("qqq: 1", "train.qqq: unknown key"),
        ("learning_rate: 1", "train.learning_rate: unknown key, did you mean train.lr?"),
        ("accelerater: {ulysses_size: 2}", "train.accelerater: unknown key, did you mean train.accelerator?"),
        ("accelerator: 1", "train.accelerator: unknown key"),
        ("lr: fast", "train.lr: 'fast' given; allowed: number >= 0"),
        ("lr:", "train.lr: nothing given; allowed: number >= 0"),
        ("lr: .inf", "train.lr: .inf given; allowed: number >= 0 and finite"),
        ("lr: -1e-3", "train.lr: -1e-3 given; allowed: number >= 0"),
        ("seed: 1.5", "train.seed: 1.5 given; allowed: whole number >= 0 and < 4294967296"),
        ("seed: true", "train.seed: true given; allowed: whole number >= 0 and < 4294967296"),
        ("micro_batch_size: 0", "train.micro_batch_size: 0 given; allowed: whole number >= 1"),
        (
            "data_parallel_mode: fsdp9",
            "train.data_parallel_mode: 'fsdp9' given; allowed: ddp, fsdp1, fsdp2 (did you mean fsdp2?)",
        ),
        (
            "data_parallel_shard_size: 0",
            "train.data_parallel_shard_size: 0 given; allowed: -1, or whole number >= 1",
        ),
        ("no_decay_params: bias", "train.no_decay_params: 'bias' given; allowed: list of text"),
        ("no_decay_params: [a, {b: 1}]", "train.no_decay_params.1: a mapping given; allowed: text"),
        ("use_wandb: maybe", "train.use_wandb: 'maybe' given; allowed: true or false"),
        ("max_steps: many", "train.max_steps: 'many' given; allowed: whole number >= 1, or null"),
        ("load_checkpoint_path: ''", "train.load_checkpoint_path: '' given; allowed: text that is not empty, or null"),
        ("seed: !!python/name:os.system", "train.seed: the tag !!python/name:os.system is not allowed here, only"),
        ("pipeline_parallel_size: 2", "train.pipeline_parallel_size: 2 given; allowed: whole number >= 1 and <= 1"),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_line(line: str, message: str) -> None:
    (told,) = problems(f"{BASE}  {line}\n")
    assert told.startswith(f"run.yaml:7: {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.sed", "3"], "--train.sed: unknown key, did you mean --train.seed?"),
        (["--trian.seed=3"], "--trian.seed: unknown key, did you mean --train.seed?"),
        (["--seed", "3"], "--seed: unknown key, did you mean --train.seed?"),
        (["--train.lr", "fast"], "--train.lr: 'fast' given; allowed: number >= 0"),
        (["--train.lr"], "--train.lr: a value is missing: --train.lr VALUE"),
        (["--train.lr", "--train.use_wandb"], "--train.lr: a value is missing: --train.lr VALUE"),
        (["--no-train.lr"], "--train.lr: --no-train.lr is for keys that are true or false"),
        (["--no-train.use_wandb=1"], "--train.use_wandb: --no-train.use_wandb takes no value"),
        (["stray"], "'stray' belongs to no key; keys are written --section.key"),
        (["--train..lr=1"], "'--train..lr=1' is no key; keys are written --section.key"),
        (["--train.no_decay_params=[a"], "--train.no_decay_params: not YAML: while parsing a flow sequence"),
        (["--train.accelerator.ulysses_size=2"], "--train.accelerator.ulysses_size: is train.ulysses_parallel_size"),
        (["--train.wandb_name", "'${x}'"], "--train.wandb_name: '${x}' holds '${' without a reference: write ${env:x}"),
        (["--train.optimizer.lr", "1e-4"], "--train.optimizer.lr: is train.lr here"),
        (["--train.accelerator={}"], "--train.accelerator: has no counterpart here: it is a block of the newer"),
        (["--train.load_checkpoint_path="], "--train.load_checkpoint_path: no value given: write null for none"),
        (
            ["--train.wandb_name", "${env:NO_ONE:-${env:NO_TWO}}"],
            "--train.wandb_name: '${env:NO_ONE:-${env:NO_TWO}}' holds a reference within a reference",
        ),
        (["--help"], "--help: every key is explained by `veomni-config reference`"),
        (["--train.wandb_name", "\udcff"], "--train.wandb_name: '\\udcff' is not UTF-8"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_as_such(arguments: list[str], message: str) -> None:
    (told,) = problems(BASE, *arguments)
    assert told.startswith(f"command line: {message}")


def test_packing_without_a_length_is_told_by_the_keys_that_need_it() -> None:
    (told,) = problems(BASE.replace("data.parquet\n", "data.parquet\n  max_seq_len: null\n"))
    assert told.startswith("run.yaml:5: data.max_seq_len: nothing given; packing (train.rmpad, ")


def test_every_wrong_item_of_a_list_is_told() -> None:
    told = problems(BASE + "  no_decay_params: [a, {b: 1}, [c]]\n")
    assert [line.split(": ")[1] for line in told] == ["train.no_decay_params.1", "train.no_decay_params.2"]


def test_every_variable_that_is_not_set_is_told() -> None:
    (told,) = problems(BASE + "  wandb_name: ${env:NO_ONE}-${env:NO_TWO}\n")
    assert "NO_ONE is not set" in told
    assert "NO_TWO is not set" in told


def test_every_unknown_argument_is_told() -> None:
    told = problems(
        BASE, "--train.optimizer.lr=1", "--train.optimizer.weight_decay=1", "--train.foo.a=1", "--train.foo.b=2"
    )
    assert {line.split(": ")[1] for line in told} == {
        "--train.optimizer.lr",
        "--train.optimizer.weight_decay",
        "--train.foo.a",
        "--train.foo.b",
    }
    assert len(problems(BASE, "--train.pad_to_length=true", "--train.wandb.id=1")) == 2


def test_a_dotted_key_at_the_top_of_a_file_is_told_how_to_write_it() -> None:
    assert problems("train.lr: 1\n" + BASE) == ["run.yaml:1: train.lr: unknown key: write lr below train"]


def test_no_silly_key_is_proposed() -> None:
    (told,) = problems(BASE + "  frobnication_steps: 1\n")
    assert told == "run.yaml:7: train.frobnication_steps: unknown key"


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file() -> None:
    told = problems(
        BASE + "  lr: fast\n  micro_batch_size: 0\n  lrr: 1\n  rmpad_with_pos_ids: true\n", "--data.num_workers=-1"
    )
    assert [line.split(": ")[:2] for line in told] == [
        ["run.yaml:7", "train.lr"],
        ["run.yaml:8", "train.micro_batch_size"],
        ["run.yaml:9", "train.lrr"],
        ["run.yaml:10", "train.rmpad_with_pos_ids"],
        ["command line", "--data.num_workers"],
    ]


def test_a_required_key_is_told_where_its_section_begins() -> None:
    told = problems("model:\n  config_path: cfg\ndata:\n  num_workers: 1\n")
    assert told[0].startswith("run.yaml:1: train.output_dir: required and not given: Run folder")
    assert told[1].startswith("run.yaml:3: data.train_path: required and not given: Training data")


def test_a_section_that_is_no_mapping_is_told_alone() -> None:
    assert problems(BASE.replace("\n  output_dir: out", " 5")) == [
        "run.yaml:5: train: 5 given; allowed: a mapping of keys"
    ]


def test_an_unknown_modality_is_told_with_the_known_ones() -> None:
    (told,) = problems(BASE.replace("cfg\n", "cfg\n  encoders: {smell: {a: 1}}\n"))
    assert told == "run.yaml:3: model.encoders.smell: unknown key; allowed: 'image', 'video' or 'audio'"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [\n", "run.yaml:2: not YAML: "),
        ("model:\n  a: b: c\n", "run.yaml:2: not YAML: mapping values are not allowed here"),
        ("train:\n\tlr: 1\n", "run.yaml:2: not YAML: "),
        ("- 1\n", "run.yaml:1: a mapping of sections is expected here"),
        ("a: 1\n---\nb: 2\n", "run.yaml:2: a second document begins here"),
        ("a: 1\nb: \x07\n", "run.yaml:2: the character U+0007 is not allowed in YAML"),
        ("a: &x [*x]\n", "run.yaml:1: *x stands for itself"),
        ("\na: *x\n", "run.yaml:2: *x has no anchor before it"),
        ("a:\n  ? [1]\n  : 2\n", "run.yaml:2: a key must be one word or number"),
        ("a: " + "[" * 60 + "]" * 60, "run.yaml:1: nested more than 50 levels deep"),
        ("<<: 3\n", "run.yaml:1: '<<' takes a mapping"),
    ],
)
def test_what_is_not_yaml_is_told_with_its_line(text: str, message: str) -> None:
    (told,) = problems(text)
    assert told.startswith(message)


def test_a_number_for_a_name_is_told() -> None:
    (told,) = problems(BASE.replace("cfg\n", "cfg\n  foundation:\n    1: a\n"))
    assert told == "run.yaml:4: model.foundation.1: unknown key; allowed: text, in quotes if it is a number"


def test_a_number_and_a_truth_value_are_different_keys() -> None:
    (told,) = problems(BASE.replace("cfg\n", "cfg\n  foundation:\n    1: a\n    true: b\n"))
    assert told == "run.yaml:4: model.foundation.1: unknown key; allowed: text, in quotes if it is a number"


def test_ten_lines_that_stand_for_billions_are_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    (told,) = problems("\n".join(lines))
    assert told == "run.yaml:5: more than 100,000 values, aliases followed"


def test_bytes_that_are_no_text_are_told_with_their_line() -> None:
    Path("run.yaml").write_bytes(b"model:\n  config_path: \xe9\n")
    with pytest.raises(ConfigError, match=r"^run\.yaml:2: byte 0xe9 is not UTF-8$"):
        parse_args(RecipeConfig, ["run.yaml"])


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^command line: no\.yaml: no such file$"):
        parse_args(RecipeConfig, ["no.yaml"])
    assert problems("extends: no.yaml\n") == ["run.yaml:1: extends: no.yaml: no such file"]


def test_a_key_that_is_given_twice_is_refused() -> None:
    assert problems(BASE + "  lr: 1\n  lr: 2\n") == ["run.yaml:8: train.lr: given twice, first at line 7"]


def test_a_message_is_one_line_even_for_a_hostile_key() -> None:
    (told,) = problems(BASE + '  "qq\\nq\\e[31m": 1\n')
    assert told == "run.yaml:7: train.qq\\nq\\x1b[31m: unknown key"


def test_a_file_of_the_newer_layout_is_told_once() -> None:
    told = problems(
        "model:\n  config_path: cfg\n  ops_implementation: {attn_implementation: sdpa}\ndata:\n  train_path: d\n"
        "  shuffle: true\ntrain:\n  optimizer:\n    lr: 1e-4\n  checkpoint:\n    output_dir: out\n"
    )
    assert told == [
        "run.yaml:3: model.ops_implementation: belongs to the newer, nested layout: "
        "rewrite it by `veomni-config migrate run.yaml`"
    ]


def test_sections_are_frozen() -> None:
    Path("run.yaml").write_text(BASE)
    cfg = parse_args(RecipeConfig, ["run.yaml"])
    with pytest.raises(ValidationError, match="frozen"):
        cfg.train.lr = 1.0
    with pytest.raises(ValidationError, match="frozen"):
        cfg.train = cfg.train


def test_a_section_that_is_made_in_python_obeys_the_same_rules() -> None:
    with pytest.raises(ValueError, match="packing is described in one way"):
        TrainConfig(output_dir=Path("out"), rmpad=True, rmpad_with_pos_ids=True)


def test_an_error_survives_the_way_between_processes() -> None:
    Path("run.yaml").write_text(BASE + "  sed: 1\n")
    with pytest.raises(ConfigError) as caught:
        parse_args(RecipeConfig, ["run.yaml"])
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert again.problems[0].key == "train.sed"
