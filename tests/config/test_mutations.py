"""Whatever is in a file or on a command line: it loads, or it is a ConfigError whose every line has a position."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from veomni_config import ConfigError, OmniRecipeConfig, RecipeConfig, parse_args

FULL = Path(__file__).with_name("full.yaml").read_text(encoding="utf-8")
SNIPPETS = (
    """
[ ] { } : - ? | > ' " # % & * ! ~ @ , = << *data &x *x !!int !!python/name:os !!binary !!set null true nan .nan .inf
1e999 0x1f 0o9 1_0 -1 $${ ${ ${env:HOME} ${env:NO_SUCH} ${env:X:-3} ${x} --- ... extends extends:\u0020mutated.yaml
extends:\u0020no.yaml <<:\u0020*data train: model:\u00203 -\u0020a %YAML\u00209.9 !<tag:yaml.org,2002:int> \u0020 \u0020\u0020 é
""".split()
    + ["\n", "\t", "\x00", "\x1b", "\r", "\u2028", "\ufeff", "\ud800", "\n  ", "\n- ", ": ", " #"]
)
VALUES = [
    "1e-4",
    "3",
    "x",
    "",
    "[a,b]",
    "[a",
    "{a: 1",
    "{lr: 2}",
    "false",
    "null",
    "\udcff",
    "${env:NO}",
    "'a",
    '"\\x"',
    "\n",
]
NAMES = """train.lr train.seed train.sed train.use_wandb no-train.use_wandb no-train.lr model.encoders model.encoders.image.a
model.foundation model.foundation.a.b train.no_decay_params data.text_keys data.max_seq_len train train. train..lr . help
extends train.accelerator.ep_size train.optimizer train.optimizer.lr \u0430 model.encoders.image=3""".split()
POSITION = re.compile(r"(mutated\.yaml:\d+|command line)(: .+)+")

edits = st.one_of(
    st.tuples(st.just("insert"), st.integers(0, len(FULL)), st.sampled_from(SNIPPETS) | st.text(max_size=3)),
    st.tuples(st.just("delete"), st.integers(0, len(FULL)), st.integers(1, 40)),
    st.tuples(st.just("value"), st.integers(0, FULL.count("\n")), st.sampled_from(SNIPPETS + VALUES)),
    st.tuples(st.just("move"), st.integers(0, FULL.count("\n")), st.integers(0, FULL.count("\n"))),
)
arguments = st.lists(
    st.one_of(
        st.builds("--{}".format, st.sampled_from(NAMES)),
        st.builds("--{}={}".format, st.sampled_from(NAMES), st.sampled_from(VALUES) | st.text(max_size=5)),
        st.sampled_from(VALUES),
        st.text(max_size=8),
    ),
    max_size=4,
)


def mutated(changes: list[tuple[str, int, int | str]]) -> str:
    text = FULL
    for kind, where, what in changes:
        if kind == "insert":
            text = f"{text[:where]}{what}{text[where:]}"
        elif kind == "delete":
            assert isinstance(what, int)
            text = text[:where] + text[where + what :]
        else:
            lines = text.split("\n")
            line = where % len(lines)
            if kind == "value":
                lines[line] = f"{lines[line].partition(':')[0]}: {what}"
            else:
                assert isinstance(what, int)
                lines.insert(what % len(lines), lines.pop(line))
            text = "\n".join(lines)
    return text


def loads_or_says_where(data: bytes, overrides: list[str]) -> None:
    Path("mutated.yaml").write_bytes(data)
    for cls in (RecipeConfig, OmniRecipeConfig):
        try:
            parse_args(cls, ["mutated.yaml", *overrides])
        except ConfigError as error:
            for line in str(error).split("\n"):
                assert POSITION.fullmatch(line), line


@pytest.fixture(scope="module", autouse=True)
def _in_a_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("mutations"))
        yield


quick = settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
thorough = settings(max_examples=5_000, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def a_file(changes: list[tuple[str, int, int | str]]) -> None:
    loads_or_says_where(mutated(changes).encode("utf-8", "surrogatepass"), [])


def bytes_in_a_file(where: int, data: bytes) -> None:
    full = FULL.encode()
    loads_or_says_where(full[:where] + data + full[where + len(data) :], [])


def a_command_line(overrides: list[str]) -> None:
    loads_or_says_where(FULL.encode(), overrides)


changed_files = given(st.lists(edits, min_size=1, max_size=4))
changed_bytes = given(st.integers(0, len(FULL)), st.binary(min_size=1, max_size=3))

test_a_changed_file = pytest.mark.filterwarnings("ignore::UserWarning")(quick(changed_files(a_file)))
test_changed_bytes = quick(changed_bytes(bytes_in_a_file))
test_any_command_line = quick(given(arguments)(a_command_line))
test_five_thousand_changed_files = pytest.mark.slow(pytest.mark.timeout(1800)(thorough(changed_files(a_file))))
test_five_thousand_command_lines = pytest.mark.slow(
    pytest.mark.timeout(1800)(thorough(given(arguments)(a_command_line)))
)
