"""The command `veomni`: run a recipe, ask the model that came out of it, and report on runs."""

from __future__ import annotations

import argparse
import mimetypes
import sys
from pathlib import Path

from veomni_recipes.launch import USER_ERROR, ends_with_one_sentence, launch

RECIPES = {
    "train_torch": "veomni_recipes.tasks.train_torch",
    "train_omni_model": "veomni_recipes.tasks.omni.train_omni_model",
    "train_qwen_vl": "veomni_recipes.tasks.omni.train_qwen_vl",
    "train_qwen_omni": "veomni_recipes.tasks.omni.train_qwen_omni",
    "train_dpo": "veomni_recipes.tasks.train_dpo",
    "train_distill": "veomni_recipes.tasks.train_distill",
    "train_image_tokenizer": "veomni_recipes.tasks.omni.train_image_tokenizer",
    "prepare_dit": "veomni_recipes.tasks.dit.prepare_dit",
    "train_dit": "veomni_recipes.tasks.dit.train_dit",
}


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    parser = argparse.ArgumentParser(prog="veomni", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train by a recipe on all devices of this machine", add_help=False)
    run.add_argument("recipe", help=f"one of {', '.join(RECIPES)}, or a script of your own")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="the YAML file and overrides such as --train.lr 1e-4")
    ask = commands.add_parser("ask", help="ask a trained model about pictures, videos or sounds, or for drawings")
    ask.add_argument("file", nargs="*", type=Path, help="pictures, videos and sounds, in the order of the question")
    ask.add_argument("question", help="what to ask")
    ask.add_argument("--output", type=Path, default=Path("drawing.png"), help="where what it draws is written")
    ask.add_argument("--seed", type=int, default=0, help="of what it draws: another one gives another drawing")
    ask.add_argument(
        "--run", type=Path, default=Path("outputs/digits"), help="run folder, or a folder that it exported"
    )
    report = commands.add_parser("report", help="write one HTML page about runs: curves, differences, answers")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    report.add_argument("--output", type=Path, default=Path("report.html"), help="the page to write")
    args = parser.parse_args(argv)
    if args.command == "report":
        return report_runs(args.runs, args.output)
    if args.command == "ask":
        return ask_model(args.run, args.file, args.question, args.output, args.seed)
    return run_recipe(args.recipe, args.arguments)


def run_recipe(recipe: str, arguments: list[str]) -> int:
    """Train by a recipe of this package, or a script, on all devices of this machine."""
    module = RECIPES.get(recipe)
    if module is None:
        script = Path(recipe)
        if not script.is_file():
            print(f"{recipe} is neither a recipe ({', '.join(RECIPES)}) nor a script", file=sys.stderr)
            return USER_ERROR
        package = Path(__file__).parent
        inside = script.resolve().is_relative_to(package)
        module = _module(script.resolve().relative_to(package.parent)) if inside else recipe
    if "--smoke" in arguments:
        arguments = _smoke(Path(recipe).stem, [argument for argument in arguments if argument != "--smoke"])
        if not arguments:
            return USER_ERROR
    return launch(module, arguments)


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts)


def _smoke(recipe: str, arguments: list[str]) -> list[str]:
    """The arguments of a run with a tiny model and data, or nothing, after a sentence, if there can be none."""
    from veomni_config import ConfigError

    from veomni_recipes.launch import processes
    from veomni_recipes.smoke import smoke_config

    name = next((Path(argument).stem for argument in arguments if argument.endswith((".yaml", ".yml"))), recipe)
    try:
        return [str(smoke_config(recipe, arguments, processes(), Path("outputs/smoke") / name))]
    except ConfigError as error:
        print(error, file=sys.stderr)
        return []


def report_runs(runs: list[Path], output: Path) -> int:
    """Write the page about these runs."""
    from veomni_recipes.report import ReportError, write_report

    try:
        write_report(runs, output)
    except ReportError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    print(f"wrote {output}: open it in a browser")
    return 0


def ask_model(run: Path, files: list[Path], question: str, output: Path, seed: int) -> int:
    """Print what the model of a run says about pictures, videos and sounds, and write what it draws."""
    from veomni_data import DataError, get_chat_template, multimodal_prompt
    from veomni_models import is_omni_folder

    folder = run / "hf_ckpt" if (run / "hf_ckpt").is_dir() else run
    if not is_omni_folder(folder):
        print(f"{run} holds no trained omni model: train one first, or name its folder with --run", file=sys.stderr)
        return USER_ERROR

    @ends_with_one_sentence(DataError)
    def answer() -> None:
        from veomni_recipes.evaluation import generate, load_exported, prompt_options

        model, processor = load_exported(folder)
        parts = [{"type": _kind(file), _kind(file): str(file)} for file in files]
        example = {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]}
        template = get_chat_template("default", processor.tokenizer)
        prompt = multimodal_prompt(example, template=template, **prompt_options(processor))
        (said,) = generate(model, processor, [prompt], seed=seed)
        print(said.text.strip())
        for index, picture in enumerate(said.pictures):
            file = output if index == 0 else output.with_stem(f"{output.stem}_{index + 1}")
            picture.save(file)
            print(f"drew {file}")

    answer()
    return 0


def _kind(file: Path) -> str:
    kind = (mimetypes.guess_type(file)[0] or "image").partition("/")[0]
    return kind if kind in ("video", "audio") else "image"


if __name__ == "__main__":
    sys.exit(main())
