"""Files of the reference system's nested layout, rewritten."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from veomni_config import ConfigError, ConfigWarning, DPORecipeConfig, OmniRecipeConfig, VLRecipeConfig, parse_args
from veomni_config.cli import main
from veomni_config.migrate import migrate
from veomni_config.newer_layout import DEFAULTS, RENAMED, WITHOUT_COUNTERPART, why_dropped
from veomni_config.schema import config_keys

EVERY_KEY = Path(__file__).with_name("newer.yaml")
KNOWN = {key.dotted for cls in (OmniRecipeConfig, VLRecipeConfig, DPORecipeConfig) for key in config_keys(cls)}

NEWER = """\
# what it is for

model:  # the model
  config_path: ${env:WEIGHTS}/qwen  # where it lies
  ops_implementation:
    # the kernel
    attn_implementation: flash_attention_2
    rms_norm_implementation: liger_kernel  # fast
data:
  train_path: '/data'
  # the loader
  dataloader:
    num_workers: 4
train:
  accelerator:  # the mesh
    ulysses_size: 2
    fsdp_config: {fsdp_mode: fsdp2, offload: true}
  optimizer:
    lr: 1e-4  # high
    no_decay_params:
    - bias
    # and
    - norm
  seed: 7
# the end
"""
OURS = """\
# what it is for

# the model
model:
  config_path: ${env:WEIGHTS}/qwen  # where it lies
  # the kernel
  attn_implementation: flash_attention_2
  # dropped by migrate, this kernel is chosen for the device of the run:
  # model.ops_implementation.rms_norm_implementation: liger_kernel  # fast
data:
  train_path: '/data'
  # the loader
  num_workers: 4
train:
  # the mesh
  ulysses_parallel_size: 2
  data_parallel_mode: fsdp2
  enable_fsdp_offload: true
  lr: 1e-4  # high
  no_decay_params:
    - bias
    # and
    - norm
  seed: 7
  output_dir: output  # default of the newer layout
  init_device: meta  # default of the newer layout
  vit_lr: 1e-6  # default of the newer layout
  dyn_bsz_runtime: main  # default of the newer layout
# the end
"""


def test_a_file_is_rewritten_with_its_comments() -> None:
    assert migrate(NEWER, "run.yaml").text == OURS


def test_every_renamed_dropped_and_added_key_is_listed() -> None:
    report = migrate(NEWER, "run.yaml").report
    assert "run.yaml:16: train.accelerator.ulysses_size: renamed: train.ulysses_parallel_size" in report
    assert (
        "run.yaml:8: model.ops_implementation.rms_norm_implementation: dropped: "
        "this kernel is chosen for the device of the run" in report
    )
    assert "run.yaml: train.init_device: added: meta, which is meant there by leaving it out" in report
    assert len(report) == 7 + 1 + 4


def test_a_kernel_that_only_exists_there_becomes_auto_and_is_listed() -> None:
    text = "model:\n  ops_implementation: {attn_implementation: veomni_flash, moe_implementation: 'eager'}\n"
    migration = migrate(text, "run.yaml")
    assert yaml.safe_load(migration.text)["model"] == {"attn_implementation": "auto", "moe_implementation": "eager"}
    assert "changed: the kernel veomni_flash is not known here" in "\n".join(migration.report)


def test_a_file_of_our_layout_stays_as_it_is() -> None:
    text = "model: {config_path: a}\ntrain:\n  optimizer: adamw  # ours\n"
    assert migrate(text, "run.yaml").text == text


def test_every_key_of_the_layout_is_kept_renamed_or_dropped_with_a_reason(tmp_path: Path) -> None:
    migration = migrate(EVERY_KEY.read_text(), str(EVERY_KEY))
    lines = migration.text.splitlines(keepends=True)
    (tmp_path / "run.yaml").write_text("".join(line for line in lines if "dpo_" not in line))  # of another recipe
    with pytest.warns(ConfigWarning, match="silent_exception"):
        cfg = parse_args(VLRecipeConfig, [str(tmp_path / "run.yaml")])
    assert (cfg.train.data_parallel_mode, cfg.model.moe_implementation, cfg.data.max_pixels) == (
        "fsdp2",
        "auto",
        602112,
    )
    written = {f"{section}.{name}" for section, keys in yaml.safe_load(migration.text).items() for name in keys}
    assert written >= set(RENAMED.values()) - {"model.foundation"}
    for line in migration.report:
        assert line.split(": ")[2] in ("renamed", "dropped", "changed", "added")


def test_preferences_are_those_of_the_recipe_for_them(tmp_path: Path) -> None:
    text = (
        "model: {model_path: m}\ndata: {train_path: p.jsonl, data_type: dpo}\ndpo_config: {beta: 0.2, loss_type: ipo}\n"
    )
    migration = migrate(text, "run.yaml")
    assert "run.yaml:2: data.data_type: changed: dpo is preference here" in migration.report
    (tmp_path / "run.yaml").write_text(migration.text)
    cfg = parse_args(DPORecipeConfig, [str(tmp_path / "run.yaml")])
    assert (cfg.data.data_type, cfg.train.dpo_beta, cfg.train.dpo_loss) == ("preference", 0.2, "ipo")


def test_the_table_leads_to_keys_that_exist() -> None:
    assert set(RENAMED.values()) <= KNOWN
    assert set(DEFAULTS) <= KNOWN
    assert all(why_dropped(key) is None for key in KNOWN)
    assert all(reason for reason in WITHOUT_COUNTERPART.values())


def test_anchors_are_written_out_where_they_are_used() -> None:
    text = (
        "x: &r {lr: 1e-4}\ntrain:\n  optimizer: {<<: *r, type: adamw}\n"
        "  checkpoint:\n    output_dir: &o out\n    load_path: *o\n"
    )
    migration = migrate(text, "run.yaml")
    plain = yaml.safe_load(migration.text)
    assert plain["train"].items() >= {"output_dir": "out", "load_checkpoint_path": "out", "lr": "1e-4"}.items()


def test_a_key_that_is_given_beats_one_that_a_merge_brings_whichever_comes_first() -> None:
    text = (
        "base: &b {lr: 1e-3, weight_decay: 0.1}\nmore: &m {lr: 1e-2, lr_min: 0}\n"
        "train:\n  optimizer:\n    <<: [*b, *m]\n    weight_decay: 0.2\n"
    )
    train = yaml.safe_load(migrate(text, "run.yaml").text)["train"]
    assert train.items() >= {"lr": "1e-3", "weight_decay": 0.2, "lr_min": 0}.items()


def test_a_block_that_is_given_twice_is_refused_as_by_the_parser() -> None:
    text = "train:\n  optimizer: {lr: 1}\n  optimizer: {lr: 2}\n"
    with pytest.raises(ConfigError, match=r"^run\.yaml:3: train\.optimizer: given twice, first at line 2$"):
        migrate(text, "run.yaml")


def test_comments_in_a_flow_value_are_kept_and_those_below_a_text_are_not_doubled() -> None:
    text = (
        "train:\n  optimizer:\n    no_decay_params: [  # first\n      'a # b',  # second\n      c]  # third\n"
        "  wandb:\n    name: >-  # folded\n      one\n      two\n  # below\n    project: p\n"
    )
    migrated = migrate(text, "run.yaml").text
    assert (
        yaml.safe_load(migrated)["train"].items()
        >= {
            "no_decay_params": ["a # b", "c"],
            "wandb_name": "one two",
            "wandb_project": "p",
        }.items()
    )
    for note in ("first", "second", "third", "folded", "below"):
        assert migrated.count(f"# {note}") == 1, migrated


def test_an_empty_block_is_left_out() -> None:
    text = "train:\n  accelerator:\n  optimizer: {}\n  wandb: null\n  checkpoint: {output_dir: out}\n"
    migration = migrate(text, "run.yaml")
    without_muon = {key.split(".")[1] for key in DEFAULTS} - {"muon_weight_decay"}
    assert set(yaml.safe_load(migration.text)["train"]) == without_muon
    assert "run.yaml:2: train.accelerator: dropped: it is empty" in migration.report


def test_muon_decays_no_matrix_where_the_newer_layout_does_not_say_so() -> None:
    train = yaml.safe_load(migrate("train:\n  optimizer: {type: muon, muon_lr: 0.01, weight_decay: 0.1}\n", "a").text)[
        "train"
    ]
    expected = {"optimizer": "muon", "muon_lr": 0.01, "weight_decay": 0.1, "muon_weight_decay": 0.0}
    assert train.items() >= expected.items()


def test_a_key_in_quotes_stays_one() -> None:
    text = "model:\n  foundation:\n  'a: b': 1\n  '': 2\ntrain: {wandb: {name: x}}\n"
    assert yaml.safe_load(migrate(text, "run.yaml").text)["model"].items() >= {"a: b": 1, "": 2}.items()


def test_ddp_is_not_given_meta_weights() -> None:
    text = "train: {accelerator: {fsdp_config: {fsdp_mode: ddp}}}\n"
    train = yaml.safe_load(migrate(text, "run.yaml").text)["train"]
    assert train["data_parallel_mode"] == "ddp"
    assert "init_device" not in train


MISSPELT = """\
model: {config_path: m, ops_implementation: {attn_implementatoin: sdpa}}
data:
  train_path: d
  dataloader: {num_worker: 3}
train:
  optimizer:
    weight_decya: 0.1
  accelerator: {ulyses_size: 2, fsdp_config: {fsdp_mod: fsdp2}}
"""


def test_a_misspelt_key_below_a_block_is_told_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.yaml").write_text(MISSPELT)
    expected = [
        f"old.yaml:{line}: {key}: unknown key of the newer layout, did you mean {near}?"
        for line, key, near in (
            (
                1,
                "model.ops_implementation.attn_implementatoin",
                "model.ops_implementation.attn_implementation",
            ),
            (4, "data.dataloader.num_worker", "data.dataloader.num_workers"),
            (7, "train.optimizer.weight_decya", "train.optimizer.weight_decay"),
            (8, "train.accelerator.ulyses_size", "train.accelerator.ulysses_size"),
            (8, "train.accelerator.fsdp_config.fsdp_mod", "train.accelerator.fsdp_config.fsdp_mode"),
        )
    ]
    assert main(["migrate", "old.yaml", "--output", "new.yaml"]) == 2
    assert capsys.readouterr().err.splitlines() == expected
    assert not Path("new.yaml").exists()
    assert main(["validate", "old.yaml"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if "rewrite it" not in line] == expected


def test_what_is_not_yaml_is_told_with_its_line() -> None:
    with pytest.raises(ConfigError, match=r"^run\.yaml:2: not YAML"):
        migrate("train: [\n", "run.yaml")


def test_the_command_writes_the_file_and_lists_the_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.yaml").write_text(NEWER)
    assert main(["migrate", "old.yaml", "--output", "new.yaml"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "old.yaml:13: data.dataloader.num_workers: renamed: data.num_workers\n" in captured.err
    assert Path("new.yaml").read_text() == OURS
    assert main(["migrate", "old.yaml"]) == 0
    assert capsys.readouterr().out == OURS


LINES = EVERY_KEY.read_text().splitlines()


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    st.sets(st.integers(0, len(LINES) - 1), max_size=60),
    st.lists(
        st.tuples(st.integers(0, len(LINES) - 1), st.sampled_from(["# note", "", "    # deep", "# ${x}: {"])),
        max_size=9,
    ),
)
def test_no_comment_is_lost_and_the_result_is_yaml(dropped: set[int], comments: list[tuple[int, str]]) -> None:
    lines = []
    for index, line in enumerate(LINES):
        lines += [f"{text} {index}" for where, text in comments if where == index and text]
        if index not in dropped or line.endswith(":"):
            lines.append(line)
    text = "\n".join(lines)
    migrated = migrate(text, "run.yaml").text
    yaml.safe_load(migrated)
    for index, note in comments:
        if note:
            assert migrated.count(f"{note.strip()} {index}\n") == text.count(f"{note.strip()} {index}\n")
