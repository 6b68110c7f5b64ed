"""Which value counts, and how values are written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from veomni_config import ConfigError, ConfigWarning, InferRecipeConfig, RecipeConfig, parse_args

BASE = "model:\n  config_path: cfg\ndata:\n  train_path: data.parquet\ntrain:\n  output_dir: out\n"
Load = Callable[..., Any]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(text: str, *arguments: str, cls: Any = RecipeConfig) -> Any:
        file = tmp_path / "run.yaml"
        file.write_text(text, encoding="utf-8")
        return parse_args(cls, [str(file), *arguments])

    return load


def test_the_command_line_beats_the_file_and_the_file_the_defaults(load: Load) -> None:
    cfg = load(BASE + "  lr: 1e-4\n  seed: 7\n", "--train.seed=9", "--data.max_seq_len", "4096")
    assert (cfg.train.seed, cfg.train.lr, cfg.data.max_seq_len, cfg.train.micro_batch_size) == (9, 1e-4, 4096, 1)


def test_the_last_of_two_values_on_the_command_line_counts(load: Load) -> None:
    assert load(BASE, "--train.seed=9", "--train.seed=10").train.seed == 10


def test_a_configuration_needs_no_file() -> None:
    arguments = ["--model.config_path=cfg", "--data.train_path", "d", "--train.output_dir", "out"]
    assert str(parse_args(RecipeConfig, arguments).train.output_dir) == "out"


def test_the_arguments_of_the_process_are_read_when_none_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["infer.py", "--infer.model_path", "m"])
    assert parse_args(InferRecipeConfig).infer.tokenizer_path == "m"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--train.use_wandb"], True),
        (["--train.use_wandb", "--train.seed", "1"], True),
        (["--train.use_wandb", "false"], False),
        (["--train.use_wandb=on"], True),
        (["--no-train.use_wandb"], False),
    ],
)
def test_a_switch_is_set_in_each_of_its_ways(load: Load, arguments: list[str], expected: bool) -> None:
    assert load(BASE + f"  use_wandb: {not expected}\n", *arguments).train.use_wandb is expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["--train.no_decay_params", "[bias, norm]"],
        ["--train.no_decay_params=bias", "--train.no_decay_params", "norm"],
        ["--train.no_decay_params=[old]", "--train.no_decay_params=[bias,norm]"],
    ],
)
def test_a_list_is_given_in_brackets_or_by_repetition(load: Load, arguments: list[str]) -> None:
    assert load(BASE, *arguments).train.no_decay_params == ("bias", "norm")


def test_null_takes_a_value_back(load: Load) -> None:
    text = BASE + "  max_steps: 3\n  no_decay_params: [a]\n"
    cfg = load(text, "--train.max_steps", "null", "--train.no_decay_params=null")
    assert (cfg.train.max_steps, cfg.train.no_decay_params) == (None, ())


def test_mappings_are_merged_and_reached_by_dotted_paths(load: Load) -> None:
    text = BASE.replace("cfg\n", "cfg\n  encoders: {image: {model_type: siglip, hidden_size: 64}}\n")
    cfg = load(text, "--model.encoders.image.hidden_size=32", "--model.encoders.image.rope.theta", "1e4")
    assert cfg.model.encoders == {"image": {"model_type": "siglip", "hidden_size": 32, "rope": {"theta": 1e4}}}


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", ".0001", "1.0e-4", "'1e-4'"])
def test_a_number_is_a_number_however_it_is_written(load: Load, text: str) -> None:
    assert load(BASE + f"  lr: {text}\n").train.lr == 1e-4
    assert load(BASE, f"--train.lr={text}").train.lr == 1e-4


def test_grouped_and_scientific_whole_numbers_are_read(load: Load) -> None:
    cfg = load(BASE, "--data.train_size", "10_000", "--train.dyn_bsz_buffer_size", "1e3")
    assert (cfg.data.train_size, cfg.train.dyn_bsz_buffer_size) == (10_000, 1000)


@pytest.mark.parametrize("name", ["007", "1e3", "true", "1_0", "[x", "no", "2024-01-01", "a: b # c", "*x"])
def test_a_key_for_text_keeps_what_was_written(load: Load, name: str) -> None:
    if name[0] not in "[*" and ":" not in name:
        assert load(BASE + f"  wandb_name: {name}\n").train.wandb_name == name
    quoted = f"'{name}'" if name[0] == "[" else name
    assert load(BASE, f"--train.wandb_name={quoted}").train.wandb_name == name


def test_yes_and_off_are_true_and_false_where_that_is_wanted(load: Load) -> None:
    cfg = load(BASE + "  use_wandb: yes\n  save_async: Off\n  wandb_name: yes\n")
    assert (cfg.train.use_wandb, cfg.train.save_async, cfg.train.wandb_name) == (True, False, "yes")


def test_derived_values_are_filled_in(load: Load) -> None:
    text = BASE.replace("config_path: cfg", "model_path: /w").replace("data.parquet", "mix.yaml")
    cfg = load(text, "--data.data_type=plaintext")
    assert (cfg.model.config_path, cfg.model.tokenizer_path) == ("/w", "/w")
    assert (cfg.data.text_keys, cfg.data.enable_multisource) == ("content_split", True)


def test_non_ascii_paths_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    file = tmp_path / "läuft.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + BASE.replace(": out", ": выход/出力").encode())
    assert str(parse_args(RecipeConfig, [str(file)]).train.output_dir) == "выход/出力"


def test_anchors_and_merge_keys_are_followed(load: Load) -> None:
    cfg = load(
        "model:\n  config_path: cfg\n  encoders:\n    image: &e {a: 1, b: 2}\n    video: {<<: *e, b: 3}\n"
        "data:\n  train_path: &p /d\n  eval_path: *p\ntrain:\n  output_dir: out\n"
    )
    assert cfg.model.encoders["video"] == {"a": 1, "b": 3}
    assert cfg.data.eval_path == "/d"


def test_a_child_file_changes_only_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "root.yaml").write_text(BASE + "  lr: 1e-3\n  seed: 1\n")
    (tmp_path / "shared" / "parent.yaml").write_text("extends: root.yaml\ntrain:\n  seed: 2\n  lr: 2e-3\n")
    (tmp_path / "child.yaml").write_text("extends: shared/parent.yaml\ndata:\ntrain:\n  lr: 3.0e-4\n")
    cfg = parse_args(RecipeConfig, [str(tmp_path / "child.yaml")])
    assert (cfg.train.lr, cfg.train.seed, cfg.data.train_path) == (3e-4, 2, "data.parquet")


def test_an_error_names_the_parent_file_that_it_stands_in(tmp_path: Path) -> None:
    (tmp_path / "parent.yaml").write_text(BASE + "  sed: 1\n")
    (tmp_path / "child.yaml").write_text("extends: parent.yaml\ntrain:\n  lr: fast\n")
    with pytest.raises(ConfigError) as caught:
        parse_args(RecipeConfig, [str(tmp_path / "child.yaml")])
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert "child.yaml:3: train.lr: " in lines[0]
    assert "parent.yaml:7: train.sed: unknown key, did you mean train.seed?" in lines[1]


def test_files_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("# here\nextends: a.yaml\n")
    with pytest.raises(ConfigError, match=r"b\.yaml:2: extends: a\.yaml -> b\.yaml -> a\.yaml is a cycle"):
        parse_args(RecipeConfig, [str(tmp_path / "a.yaml")])


def test_the_environment_is_read_where_a_file_asks_for_it(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATE", "1e-3")
    monkeypatch.setenv("ROOT", "/nested/${env:RATE}")
    monkeypatch.delenv("NO_SUCH", raising=False)
    cfg = load(
        BASE + "  lr: ${env:RATE}\n  wandb_name: '$${env:RATE}'\n  seed: ${env:NO_SUCH:-5}\n",
        "--data.train_path=${env:ROOT}/a",
        "--train.wandb_project=${env:NO_SUCH:-a:-b}",
    )
    assert (cfg.train.lr, cfg.train.seed, cfg.train.wandb_name) == (1e-3, 5, "${env:RATE}")
    assert cfg.data.train_path == "/nested/${env:RATE}/a"
    assert cfg.train.wandb_project == "a:-b"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("${env:NO_SUCH}", "NO_SUCH is not set: set it, or give a default by ${env:NO_SUCH:-default}"),
        ("${HOME}/x", "write ${env:HOME}"),
        ("${env:A", "write ${env:NAME}"),
    ],
)
def test_a_reference_that_leads_nowhere_is_an_error(load: Load, value: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(BASE + f"  wandb_name: '{value}'\n")
    assert str(caught.value).count("\n") == 0
    assert "run.yaml:7: train.wandb_name: " in str(caught.value)
    assert message in str(caught.value)


def test_a_legacy_key_loads_with_one_warning_that_says_why(load: Load) -> None:
    with pytest.warns(ConfigWarning) as caught:
        assert load(BASE.replace("data.parquet\n", "data.parquet\n  split_nums: 4\n")).data.split_nums == 4
    assert len(caught) == 1
    assert "run.yaml:5: data.split_nums: has no effect: files are split" in str(caught[0].message)


def test_a_file_of_the_reference_system_loads_unchanged() -> None:
    cfg = parse_args(RecipeConfig, [str(Path(__file__).with_name("full.yaml"))])
    assert cfg.train.rmpad_with_pos_ids
    assert (cfg.train.wandb_name, cfg.train.max_steps, cfg.train.dyn_bsz) == ("007", 1000, True)
    assert cfg.model.encoders["image"]["hidden_size"] == "1024"
