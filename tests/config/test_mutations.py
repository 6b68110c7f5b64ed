"""Whatever is in a file or on a command line: it loads, or it is a ConfigError whose every line has a position."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TypeAlias

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from veomni_config import ConfigError, OmniRecipeConfig, RecipeConfig, parse_args
from veomni_config.parse import resolve
from veomni_config.validate import further_problems

pytestmark = pytest.mark.filterwarnings("ignore::veomni_config.ConfigWarning")

FULL = Path(__file__).with_name("full.yaml").read_text(encoding="utf-8")
POSITION = re.compile(r"(mutated\.yaml:\d+|command line)(: .+)+")
Change: TypeAlias = tuple[str, int, int | str]

SNIPPETS = [
    *"[]{}:-?|>'\"#%&*!~@,=\n\t\r\x00\x1b\u2028\ufeff\ud800é",
    *["<<", "*data", "&x ", "*x", "!!int ", "!!python/name:os ", "!!binary ", "!!set ", "!<tag:yaml.org,2002:int> "],
    *["null", "true", "nan", ".nan", ".inf", "1e999", "0x1f", "0o9", "1_0", "-1", "---\n", "...\n", "%YAML 9.9\n"],
    *["$${", "${", "${env:HOME}", "${env:NO_SUCH}", "${env:X:-3}", "${x}", "\n  ", "\n- ", ": ", " #", "  "],
    *["extends: mutated.yaml\n", "extends: no.yaml\n", "extends: [a]\n", "<<: *data\n", "train:\n", "model: 3\n"],
]
VALUES = [
    *["1e-4", "3", "x", "", "[a,b]", "[a", "{a: 1", "{lr: 2}", "false", "null", "\udcff", "${env:NO}", "'a", "\n"],
    *['"\\x"', "-1", "--", "=", "a=b", "[[1]]", "{1: {2: 3}}", "{? [a] : b}", "[*x]", "é", "1e400", "9" * 5000],
]
NAMES = [
    *["train.lr", "train.seed", "train.sed", "train.use_wandb", "no-train.use_wandb", "no-train.lr", "train", "train."],
    *["model.encoders", "model.encoders.image.a", "model.encoders.smell", "model.foundation", "model.foundation.a.b"],
    *["train.no_decay_params", "train.no_decay_params.0", "data.text_keys", "data.max_seq_len", "train..lr", ".", ""],
    *["help", "extends", "train.accelerator.ep_size", "train.optimizer", "train.optimizer.lr", "tr\u0430in.lr", "\n"],
]

changes = st.one_of(
    st.tuples(st.just("insert"), st.integers(0, len(FULL)), st.sampled_from(SNIPPETS) | st.text(max_size=3)),
    st.tuples(st.just("delete"), st.integers(0, len(FULL)), st.integers(1, 40)),
    st.tuples(st.just("value"), st.integers(0, FULL.count("\n")), st.sampled_from(SNIPPETS + VALUES)),
    st.tuples(st.just("move"), st.integers(0, FULL.count("\n")), st.integers(0, FULL.count("\n"))),
)
files = st.lists(changes, min_size=1, max_size=4)
command_lines = st.lists(
    st.one_of(
        st.builds("--{}".format, st.sampled_from(NAMES)),
        st.builds("--{}={}".format, st.sampled_from(NAMES), st.sampled_from(VALUES) | st.text(max_size=5)),
        st.sampled_from(VALUES),
        st.text(max_size=8),
    ),
    max_size=4,
)
health = list(HealthCheck)
quick = settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=health)
thorough = settings(max_examples=5_000, deadline=None, database=None, suppress_health_check=health)


@pytest.fixture(scope="module", autouse=True)
def _in_a_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("mutations"))
        yield


def mutated(made: list[Change]) -> bytes:
    text = FULL
    for kind, where, what in made:
        if isinstance(what, str) and kind == "insert":
            text = f"{text[:where]}{what}{text[where:]}"
        elif isinstance(what, int) and kind == "delete":
            text = text[:where] + text[where + what :]
        else:
            lines = text.split("\n")
            line = where % len(lines)
            if isinstance(what, int):
                lines.insert(what % len(lines), lines.pop(line))
            else:
                lines[line] = f"{lines[line].partition(':')[0]}: {what}"
            text = "\n".join(lines)
    return text.encode("utf-8", "surrogatepass")


def loads_or_says_where(data: bytes, overrides: list[str]) -> None:
    Path("mutated.yaml").write_bytes(data)
    validate = partial(further_problems, world_size=8)
    for read in (partial(parse_args, RecipeConfig), partial(resolve, OmniRecipeConfig, further=validate)):
        try:
            read(argv=["mutated.yaml", *overrides])
        except ConfigError as error:
            for line in str(error).split("\n"):
                assert POSITION.fullmatch(line), line


@quick
@given(files)
def test_a_changed_file_loads_or_says_where_it_is_wrong(made: list[Change]) -> None:
    loads_or_says_where(mutated(made), [])


@quick
@given(st.integers(0, len(FULL)), st.binary(min_size=1, max_size=3))
def test_changed_bytes_load_or_say_where_they_are_wrong(where: int, data: bytes) -> None:
    full = FULL.encode()
    loads_or_says_where(full[:where] + data + full[where + len(data) :], [])


@quick
@given(command_lines)
def test_any_command_line_loads_or_says_where_it_is_wrong(overrides: list[str]) -> None:
    loads_or_says_where(FULL.encode(), overrides)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@thorough
@given(files)
def test_five_thousand_changed_files_load_or_say_where_they_are_wrong(made: list[Change]) -> None:
    loads_or_says_where(mutated(made), [])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@thorough
@given(command_lines)
def test_five_thousand_command_lines_load_or_say_where_they_are_wrong(overrides: list[str]) -> None:
    loads_or_says_where(FULL.encode(), overrides)
