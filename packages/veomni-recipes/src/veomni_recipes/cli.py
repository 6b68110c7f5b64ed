"""The command `veomni`: list, copy, check and run recipes, ask the models that come out of them, report on runs."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from veomni_recipes.catalog import copy_out, listing
from veomni_recipes.launch import USER_ERROR, ends_with_one_sentence, launch

RECIPES = {
    "train_torch": "veomni_recipes.tasks.train_torch",
    "train_dpo": "veomni_recipes.tasks.train_dpo",
    "train_distill": "veomni_recipes.tasks.train_distill",
    "infer": "veomni_recipes.tasks.infer",
    "evaluate": "veomni_recipes.tasks.evaluate",
    "train_omni_model": "veomni_recipes.tasks.omni.train_omni_model",
    "train_qwen_vl": "veomni_recipes.tasks.omni.train_qwen_vl",
    "train_qwen_omni": "veomni_recipes.tasks.omni.train_qwen_omni",
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
    ask = commands.add_parser("ask", help="ask a trained model anything, or talk with it")
    ask.add_argument(
        "words",
        nargs="*",
        metavar="FILE ... QUESTION",
        help="pictures, videos and sounds, and what to ask about them; a conversation without a question",
    )
    ask.add_argument("--output", type=Path, default=Path("drawing.png"), help="where what it draws is written")
    ask.add_argument("--seed", type=int, default=0, help="of what it draws: another one gives another drawing")
    ask.add_argument(
        "--run", type=Path, default=Path("outputs/digits"), help="run folder, or a folder that it exported"
    )
    report = commands.add_parser("report", help="write one HTML page about runs: curves, differences, answers")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    report.add_argument("--output", type=Path, default=Path("report.html"), help="the page to write")
    again = commands.add_parser("replay", help="run a step again that went wrong: losses by sample, what is not finite")
    again.add_argument("run", type=Path, metavar="RUN", help="its folder")
    again.add_argument("--step", type=int, help="which step; the newest that went wrong if left out")
    commands.add_parser("ls", help="list the recipes and configurations that ship")
    copy = commands.add_parser("cp", help="copy a recipe or a configuration, to change it")
    copy.add_argument("name", help="of a recipe or configuration, see `veomni ls`")
    copy.add_argument("destination", type=Path, help="a file, or a folder that gets the recipe and a configuration")
    commands.add_parser("doctor", help="show what this machine has, what a run will use, and what commonly goes wrong")
    check = commands.add_parser(
        "check", help="one step of a tiny model on the configuration's layout and data against one process"
    )
    check.add_argument("config", type=Path, help="the YAML file of a run")
    check.add_argument("--recipe", help="the recipe or script that it is for; found from the file otherwise")
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "check":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command == "ls":
        print(listing(RECIPES))
        return 0
    if args.command == "cp":
        return copy_files(args.name, args.destination)
    if args.command == "doctor":
        from veomni_recipes import doctor

        return doctor.main()
    if args.command == "check":
        return check_config(args.config, args.recipe, rest)
    if args.command == "replay":
        from veomni_recipes.replay import replay_run

        return replay_run(args.run, args.step)
    if args.command == "report":
        return report_runs(args.runs, args.output)
    if args.command == "ask":
        return ask_model(args.run, args.words, args.output, args.seed)
    return run_recipe(args.recipe, args.arguments)


def run_recipe(recipe: str, arguments: list[str]) -> int:
    """Train by a recipe of this package, or a script, on all devices of this machine."""
    module = _program(recipe)
    if module is None:
        return USER_ERROR
    if "--smoke" in arguments:
        arguments = _smoke(Path(recipe).stem, [argument for argument in arguments if argument != "--smoke"])
        if not arguments:
            return USER_ERROR
    return launch(module, arguments)


def _program(recipe: str) -> str | None:
    """The module of a recipe or of a script in here, else the path of a script; None, after a sentence, if neither."""
    if recipe in RECIPES:
        return RECIPES[recipe]
    script, package = Path(recipe).resolve(), Path(__file__).parent
    if not script.is_file() or script.suffix != ".py":
        print(f"{recipe} is neither a recipe ({', '.join(RECIPES)}) nor a script", file=sys.stderr)
        return None
    if script.is_relative_to(package):
        return ".".join(script.relative_to(package.parent).with_suffix("").parts)
    return recipe


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


def copy_files(name: str, destination: Path) -> int:
    """Copy a recipe or a configuration out of this package."""
    from veomni_config import ConfigError

    try:
        files = copy_out(name, destination, RECIPES)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    for file in files:
        print(f"wrote {file}")
    script = next((file for file in files if file.suffix == ".py"), None)
    config = next((file for file in files if file.suffix == ".yaml"), "CONFIG")
    if script is not None:
        print(f"run it: veomni run {script} {config}")
    return 0


def check_config(config: Path, recipe: str | None, overrides: list[str]) -> int:
    """Compare one step on the layout of a configuration with one process."""
    from veomni_config import ConfigError

    from veomni_recipes.smoke import check_arguments, recipe_for

    try:
        like = recipe if recipe in RECIPES else recipe_for([str(config), *overrides])
        module = _program(recipe or like)
        if module is None:
            return USER_ERROR
        with tempfile.TemporaryDirectory() as folder:
            processes, arguments = check_arguments(like, [str(config), *overrides], Path(folder))
            os.environ |= {"NPROC_PER_NODE": str(processes), "CUDA_VISIBLE_DEVICES": ""}
            return launch("veomni_recipes.parity_check", [module, *arguments])
    except ConfigError as error:
        print(error, file=sys.stderr)
        return USER_ERROR


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


def ask_model(run: Path, words: list[str], output: Path, seed: int) -> int:
    """Print what the model of a run answers, and write what it draws; a conversation without words.

    Args:
        run: its folder, or a model's.
        words: files, and the question.
        output: of the first drawing.
        seed: of drawings.
    """
    from veomni_config import ConfigError
    from veomni_data import DataError
    from veomni_models import ModelError

    @ends_with_one_sentence(ConfigError, DataError, ModelError)
    def answer() -> None:
        from veomni_recipes.chat import Speaker, exported_folder, question, talk
        from veomni_recipes.evaluation import load_exported

        folder, chat = exported_folder(run)
        model, processor = load_exported(folder)
        speaker = Speaker(model, processor, chat, {"max_new_tokens": 512, "seed": seed})
        if not words:
            talk(speaker, output.parent)
            return
        *files, text = words
        (said,) = speaker.answer([{"messages": [question(text, files)]} if chat else {"prompt": text}])
        print(said.text.strip())
        for index, picture in enumerate(said.pictures):
            file = output if index == 0 else output.with_stem(f"{output.stem}_{index + 1}")
            picture.save(file)
            print(f"drew {file}")

    answer()
    return 0


if __name__ == "__main__":
    sys.exit(main())
