"""One page about one or several runs: curves, what their configurations differ in, figures, pictures and answers.

The page needs nothing beside it, so that it can be mailed or kept with a result.
"""

from __future__ import annotations

import base64
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from veomni_recipes.run_folder import METRICS, VALIDATION, read_json, read_metrics

_POINTS = 2000  # of a curve; more are averaged, for the page stays small and no screen shows them
_ANSWERS = 24
_FIRST = (
    "loss",
    "validation: loss",
    "validation: accuracy",
    "grad_norm",
    "lr",
    "tokens_per_second",
    "mfu",
    "tflops_per_second",
    "peak_memory_gb",
    "data_wait_seconds",
)  # charts in this order, then groups such as the losses by source, then the others
_GROUPS = ("losses: ", "losses_by_source: ", "shares: ", "validation: ")
_NOT_DRAWN = ("step", "epoch", "validation: step", "validation: epoch", "validation: targets")


class ReportError(ValueError):
    """A folder is not that of a run, or the page cannot be written."""


@dataclass(frozen=True)
class Run:
    """What a report shows of a run.

    Attributes:
        name: of its folder, with as much of the path as tells it from the others.
        curves: steps and values of each metric.
        config: resolved values by dotted key.
        figures: what the summary table says, by heading.
        pictures: name and data URL of each PNG in the folder.
        answers: lines of `predictions.jsonl`, wrong ones first.
    """

    name: str
    curves: dict[str, tuple[list[float], list[float]]]
    config: dict[str, str]
    figures: dict[str, str]
    pictures: list[tuple[str, str]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)


def write_report(folders: Sequence[Path], output: Path) -> None:
    """Write the page about these run folders.

    Raises:
        ReportError: a folder holds no metrics, or `output` cannot be written.
    """
    import jinja2

    runs = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    metrics = list(dict.fromkeys(metric for run in runs for metric in run.curves))
    metrics.sort(key=_place)
    charts = [
        {"metric": m, "runs": [{"name": r.name, "steps": c[0], "values": c[1]} for r in runs if (c := r.curves.get(m))]}
        for m in metrics
    ]
    source = resources.files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    page = template.render(
        title=" and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs",
        runs=runs,
        charts=json.dumps(charts).replace("<", "\\u003c"),
        names=[run.name for run in runs],
        headings=list(dict.fromkeys(heading for run in runs for heading in run.figures)),
        differences=config_differences(runs),
    )
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{output} cannot be written: {error.strerror}") from error


def read_run(folder: Path, name: str) -> Run:
    """What the report needs of a run folder.

    Raises:
        ReportError: it holds no metrics, or a file in it is damaged.
    """
    try:
        lines = read_metrics(folder)
        validations = read_metrics(folder, VALIDATION)
        summary = read_json(folder / "summary.json")
        answers = _read_answers(folder / "predictions.jsonl")
    except (ValueError, OSError) as error:
        raise ReportError(f"{folder} cannot be read: {error}") from error
    if not lines:
        raise ReportError(f"{folder} is not the folder of a run: it holds no {METRICS} with a step in it")
    return Run(
        name,
        {metric: _thinned(*curve) for metric, curve in _curves(lines, validations).items()},
        dict(_leaves(_read_config(folder / "config.yaml"))),
        figures(lines, summary, validations),
        [(p.stem.replace("_", " "), _data_url(p)) for p in sorted(folder.glob("*.png")) if p.name != "loss.png"],
        answers,
    )


def config_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Each key whose value is not the same in all runs, with the values."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = [(key, [run.config.get(key, "not there") for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise ReportError(f"the same run is named twice: {', '.join(map(str, folders))}")


def _place(metric: str) -> tuple[int, str]:
    """Where a chart comes among the others."""
    if metric in _FIRST:
        return _FIRST.index(metric), ""
    group = next((i for i, group in enumerate(_GROUPS) if metric.startswith(group)), len(_GROUPS))
    return len(_FIRST) + group, metric if group < len(_GROUPS) else ""


def _curves(
    lines: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[list[float], list[float]]]:
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for line in [*lines, *({"step": line["step"], "validation": line} for line in validations)]:
        for metric, value in _numbers(line):
            if metric not in _NOT_DRAWN:
                steps, values = curves.setdefault(metric, ([], []))
                steps.append(line["step"])
                values.append(value)
    return curves


def _numbers(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{path}{name}: ")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf"):
            yield path + name, value


def _thinned(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    size = -(-len(steps) // _POINTS)
    if size == 1:
        return steps, values
    starts = range(0, len(steps), size)
    return [steps[i] for i in starts], [statistics.fmean(values[i : i + size]) for i in starts]


def figures(
    lines: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], validations: Sequence[Mapping[str, Any]] = ()
) -> dict[str, str]:
    """What a run came to, by heading, from its metrics, summary and validations."""
    last = lines[-max(1, len(lines) // 20) :]
    found = {
        "steps": f"{lines[-1]['step']:,}",
        "tokens": f"{sum(line.get('tokens', 0) for line in lines):,}",
        "loss (mean of the last 5 %)": f"{_mean(line['loss'] for line in last):.4f}",
        "tokens/s (median)": f"{statistics.median(line.get('tokens_per_second', 0) for line in lines):,.0f}",
    }
    for name, value in summary.items():
        if name.endswith("_accuracy"):
            found[name.removesuffix("_accuracy").replace("_", " ")] = f"{value:.1%}"
        elif name in ("parameters", "world_size"):
            found[name.replace("_", " ")] = f"{value:,}"
        elif name == "seconds":
            found["seconds in all"] = f"{value:,.0f}"
    if peak := max((line.get("peak_memory_gb", 0) for line in lines), default=0):
        found["peak memory of a rank, GB"] = f"{peak:.2f}"
    if shares := [line["mfu"] for line in lines if "mfu" in line]:
        found["MFU (median)"] = f"{statistics.median(shares):.1%}"
    if seconds := sum(line.get("seconds", 0) for line in lines):
        found["waited for data"] = f"{sum(line.get('data_wait_seconds', 0) for line in lines) / seconds:.1%}"
    if skipped := sum(not _is_finite(line["loss"]) for line in lines):
        found["steps whose loss is not finite"] = f"{skipped:,}"
    if validations:
        best = min(validations, key=lambda line: line["loss"])
        found["validation loss (last)"] = f"{validations[-1]['loss']:.4f}"
        found["validation loss (least)"] = f"{best['loss']:.4f} at step {best['step']:,}"
    return found


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if _is_finite(value)]
    return statistics.fmean(finite) if finite else float("nan")


def _read_config(path: Path) -> Any:
    import yaml

    if not path.is_file():
        return {}
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ReportError(f"{path} is not YAML: {error}") from error


def _leaves(values: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(values, Mapping) and (values or not path):
        for name, value in values.items():
            yield from _leaves(value, f"{path}.{name}" if path else str(name))
    else:
        yield path, json.dumps(values, default=str)


def _read_answers(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    for answer in answers:
        answer["right"] = str(answer.get("text")).strip() == str(answer.get("truth")).strip()
    wrong = [answer for answer in answers if not answer["right"]][: _ANSWERS // 2]
    return wrong + [answer for answer in answers if answer["right"]][: _ANSWERS - len(wrong)]


def _data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
