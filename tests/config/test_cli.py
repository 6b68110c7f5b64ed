"""The command `veomni-config`, as somebody types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from veomni_config import OmniRecipeConfig, RecipeConfig, dump_config, parse_args
from veomni_config.cli import main
from veomni_config.schema import config_keys

RUN = """\
model:
  config_path: cfg
  encoders:
    image: {model_type: siglip}
data:
  train_path: data.parquet
train:
  output_dir: out
  lr: 1e-4
"""
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RUN)
    Path("data.parquet").touch()


def test_validate_says_for_which_recipe_a_file_is_valid(capsys: Capture) -> None:
    assert main(["validate", "run.yaml"]) == 0
    assert main(["validate", "run.yaml", "--train.freeze_encoder", "--data.max_pixels", "100"]) == 0
    assert main(["validate", "run.yaml", "--train.freeze_vit"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"run.yaml: valid ({name})" for name in ("text", "omni", "vl")]


def test_validate_plans_for_a_world_size(capsys: Capture) -> None:
    assert main(["validate", "run.yaml", "--train.ulysses_parallel_size=2", "--world-size", "8"]) == 0
    assert "  dp: 4\n" in capsys.readouterr().out
    assert main(["validate", "run.yaml", "--train.ulysses_parallel_size=2", "--world-size=7"]) == 2
    assert capsys.readouterr().err.startswith(
        "command line: --train.ulysses_parallel_size: world size 7 is no multiple"
    )
    Path("run.yaml").write_text(RUN + "  ulysses_parallel_size: 2\n")
    assert main(["validate", "run.yaml", "--world-size=7"]) == 2
    assert capsys.readouterr().err.startswith("run.yaml:10: train.ulysses_parallel_size: world size 7 is no multiple")


def test_sizes_are_told_together_with_other_mistakes(capsys: Capture) -> None:
    arguments = ["--train.ulysses_parallel_size=2", "--world-size=7"]
    assert main(["validate", "run.yaml", *arguments, "--train.sed=1", "--train.seed=x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["--train.sed", "--train.seed", "--train.ulysses_parallel_size"]
    assert main(["validate", "run.yaml", *arguments, "--train.micro_batch_size=x"]) == 2
    assert "world size" not in capsys.readouterr().err
    assert main(["validate", "run.yaml", "--train.dyn_bsz_margin=9999", "--world-size=1"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_files_that_are_not_there_are_told_by_validate(capsys: Capture) -> None:
    wrong = [
        "--model.model_path=./weights",
        "--model.encoders.image.model_path=/no/vit",
        "--data.train_path=data.parquet, more.jsonl",
        "--data.eval_path=~nobody-here/eval",
        "--train.load_checkpoint_path=no/step_1",
    ]
    assert main(["validate", "run.yaml", *wrong]) == 2
    assert sorted(capsys.readouterr().err.splitlines()) == [
        "command line: --data.eval_path: ~nobody-here/eval: no such file or folder",
        "command line: --data.train_path: more.jsonl: no such file or folder",
        "command line: --model.encoders.image.model_path: /no/vit: no such file or folder",
        "command line: --model.model_path: ./weights: no such file or folder",
        "command line: --train.load_checkpoint_path: no/step_1: no such file or folder",
    ]
    right = ["--model.model_path=org/model", "--data.train_path=*.parquet", "--train.load_checkpoint_path=auto"]
    assert main(["validate", "run.yaml", *right]) == 0


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("sources: [data.parquet]\nnames: [a]\nschedule: [{schedule_type: const, weights: [1.0]}]\n", []),
        ("[", ["cannot be read: "]),
        ("names: [a]\n", ["sources: a list of paths, or of mappings with a path, is expected"]),
        (
            "sources: [data.parquet, b.jsonl]\nnames: [a]\nschedule: [{schedule_type: cons, weights: [1.0]}]\n",
            [
                "sources: b.jsonl: no such",
                "names: a list of 2",
                "schedule.0.schedule_type: 'cons'",
                "schedule.0.weights",
            ],
        ),
        ("sources: [data.parquet]\nschedule: 1\n", ["schedule: a list of mappings"]),
        ("sources: [{path: data.parquet}, data.parquet]\nnames: [a, b]\n", []),
        (
            "sources: [data.parquet]\nstopping: ever\nschedule:\n"
            "  - {schedule_type: const, weights: [1]}\n  - {schedule_type: linear, weights: [1], steps: 0}\n",
            ["schedule.0.steps: a whole number", "schedule.1.steps: a whole number", "stopping: 'ever'"],
        ),
    ],
)
def test_a_multisource_file_is_looked_into(text: str, wrong: list[str], capsys: Capture) -> None:
    Path("mix.yaml").write_text(text)
    assert main(["validate", "run.yaml", "--data.train_path=mix.yaml"]) == (2 if wrong else 0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(wrong)
    for line, start in zip(lines, wrong, strict=True):
        assert line.startswith(f"command line: --data.train_path: mix.yaml: {start}")


def test_a_misspelt_kernel_is_told_by_validate_and_an_unknown_one_is_not(capsys: Capture) -> None:
    assert main(["validate", "run.yaml", "--model.attn_implementation=flash_atention_2"]) == 2
    assert "did you mean flash_attention_2?" in capsys.readouterr().err
    for name in ("sdpa", "kernels-community/paged", "paged_attention", "null"):
        assert main(["validate", "run.yaml", f"--model.attn_implementation={name}"]) == 0


def test_a_pipe_is_read_once() -> None:
    command = Path(sys.executable).with_name("veomni-config")
    run = subprocess.run([command, "validate", "/dev/stdin"], input=RUN, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "/dev/stdin: valid (text)\n", "")


def test_show_tells_where_each_value_came_from(capsys: Capture) -> None:
    assert main(["show", "run.yaml", "--train.seed", "3"]) == 0
    out = capsys.readouterr().out
    shown = {line.split(":")[0].strip(): line.partition("#")[2].strip() for line in out.splitlines() if "#" in line}
    assert (shown["lr"], shown["seed"], shown["model_type"]) == ("run.yaml:9", "command line", "run.yaml:4")
    assert (shown["tokenizer_path"], shown["lr_min"]) == ("derived", "default")
    Path("shown.yaml").write_text(out)
    assert parse_args(RecipeConfig, ["shown.yaml"]) == parse_args(RecipeConfig, ["run.yaml", "--train.seed", "3"])


def test_diff_tells_what_two_runs_differ_in(capsys: Capture) -> None:
    Path("a").mkdir()
    dump_config(parse_args(RecipeConfig, ["run.yaml", "--train.lr=2e-4"]), Path("a/config.yaml"))
    assert main(["diff", "run.yaml", "run.yaml"]) == 0
    assert main(["diff", "run.yaml", "a"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("train.lr: 0.0001 (run.yaml:9) -> 0.0002 (a/config.yaml:")


def test_the_schema_has_every_key_with_its_meaning(capsys: Capture) -> None:
    assert main(["schema", "--recipe", "omni"]) == 0
    schema = json.loads(capsys.readouterr().out)
    for key in config_keys(OmniRecipeConfig):
        section = schema["properties"][key.path[0]]["anyOf"][0]["$ref"].rsplit("/", 1)[-1]
        described = schema["$defs"][section]["properties"][key.path[1]]["description"]
        assert described.startswith(str(key.field.description))
    assert schema["properties"]["extends"]["type"] == "string"
    assert not any("required" in section for section in (schema, *schema["$defs"].values()))


def test_a_recipe_of_ones_own_is_named_by_its_module(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("own_recipe.py").write_text(
        "from veomni_config import RecipeConfig, TrainConfig\n"
        "class Train(TrainConfig):\n    beta: float = 1.0\n"
        "class Recipe(RecipeConfig):\n    train: Train\n"
    )
    monkeypatch.delitem(sys.modules, "own_recipe", raising=False)
    assert main(["validate", "run.yaml", "--train.beta=2", "--recipe=own_recipe:Recipe"]) == 0
    assert main(["validate", "run.yaml", "--recipe=own_recipe:Nothing"]) == 2
    told = capsys.readouterr().err
    assert "has no attribute 'Nothing'; allowed: text, omni, vl, dit, dpo, distill, infer, evaluate" in told


@pytest.mark.parametrize("text", ["raise RuntimeError('no')\n", "def\n", "import sys\nsys.exit(3)\n"])
def test_a_recipe_whose_module_cannot_be_imported_is_told_in_one_line(
    text: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("broken_recipe.py").write_text(text)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert main(["validate", "run.yaml", "--recipe=broken_recipe:Recipe"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("veomni-config: --recipe broken_recipe:Recipe: ")


def test_a_terminal_without_the_characters_of_a_file_is_no_reason_to_fail() -> None:
    command = Path(sys.executable).with_name("veomni-config")
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    run = subprocess.run(
        [command, "show", "run.yaml", "--train.wandb_name=é"], capture_output=True, check=False, env=environment
    )
    assert (run.returncode, run.stderr) == (0, b"")
    assert b"wandb_name: \\xe9" in run.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["validate"],
        ["validate", "no.yaml"],
        ["validate", "run.yaml", "--train.lr"],
        ["validate", "run.yaml", "--world-size"],
        ["validate", "run.yaml", "--world-size=two"],
        ["validate", "run.yaml", "--world-size=" + "9" * 5000],
        ["validate", "run.yaml", "--world-size=999999999", "--train.ulysses_parallel_size=2"],
        ["validate", "run.yaml", "--recipe=no_such:Thing"],
        ["validate", "run.yaml", "--recipe=.x:Y"],
        ["show", "run.yaml", "--recipe=pydantic:BaseModel"],
        ["show", "run.yaml", "stray"],
        ["diff", "run.yaml"],
        ["migrate", "no.yaml"],
        ["migrate", "."],
        ["schema", "--recipe=x"],
        ["reference", "x"],
        ["validat", "run.yaml"],
        [],
    ],
)
def test_what_is_typed_wrong_ends_with_2_and_words(arguments: list[str], capsys: Capture) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip()


@pytest.mark.parametrize("arguments", [["--help"], ["help"], ["validate", "--help"], ["show", "run.yaml", "-h"]])
def test_help_is_given_wherever_it_is_asked_for(arguments: list[str], capsys: Capture) -> None:
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("usage: veomni-config")


def test_legacy_keys_are_warned_of_in_one_line(capsys: Capture) -> None:
    assert main(["validate", "run.yaml", "--data.split_nums=2"]) == 0
    assert capsys.readouterr().err == (
        "warning: command line: data.split_nums: has no effect: files are split over ranks by the loader itself\n"
    )


def test_the_installed_command_ends_with_2_and_no_traceback() -> None:
    Path("bad.yaml").write_text(RUN + "  sed: 1\n")
    command = Path(sys.executable).with_name("veomni-config")
    run = subprocess.run([command, "validate", "bad.yaml"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "bad.yaml:10: train.sed: unknown key, did you mean train.seed?\n"


def test_the_reference_page_in_the_docs_is_current(capsys: Capture) -> None:
    assert main(["reference"]) == 0
    page = Path(__file__).parents[2] / "docs" / "reference" / "config.md"
    fresh = capsys.readouterr().out
    assert page.read_text(encoding="utf-8") == fresh, "run: veomni-config reference > docs/reference/config.md"
    for key in config_keys(OmniRecipeConfig):
        assert f"| `{key.dotted}` |" in fresh
        assert str(key.field.description).endswith("."), key.dotted


def test_the_shipped_configurations_are_valid() -> None:
    folder = Path(__file__).parents[2] / "packages" / "veomni-recipes" / "src" / "veomni_recipes" / "configs"
    files = [file for file in folder.rglob("*.yaml") if {"model", "train"} & set(yaml.safe_load(file.read_text()))]
    assert files
    assert [file for file in files if main(["show", str(file)])] == []
