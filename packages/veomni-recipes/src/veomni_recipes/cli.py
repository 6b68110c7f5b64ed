"""The command `veomni`: run a recipe, and ask the model that came out of it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from veomni_recipes.launch import USER_ERROR, ends_with_one_sentence, launch

RECIPES = {"train_omni_model": "veomni_recipes.tasks.omni.train_omni_model"}


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    parser = argparse.ArgumentParser(prog="veomni", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train by a recipe on all devices of this machine", add_help=False)
    run.add_argument("recipe", help=f"one of {', '.join(RECIPES)}, or a script of your own")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="the YAML file and overrides such as --train.lr 1e-4")
    ask = commands.add_parser("ask", help="show a trained model pictures and ask about them")
    ask.add_argument("picture", nargs="+", type=Path, help="files of pictures, in the order of the question")
    ask.add_argument("question", help="what to ask")
    ask.add_argument(
        "--run", type=Path, default=Path("outputs/digits"), help="run folder, or a folder that it exported"
    )
    args = parser.parse_args(argv)
    if args.command == "ask":
        return ask_model(args.run, args.picture, args.question)
    if args.recipe not in RECIPES and not Path(args.recipe).is_file():
        print(f"{args.recipe} is neither a recipe ({', '.join(RECIPES)}) nor a script", file=sys.stderr)
        return USER_ERROR
    return launch(RECIPES.get(args.recipe, args.recipe), args.arguments)


def ask_model(run: Path, pictures: list[Path], question: str) -> int:
    """Print what the model of a run says about pictures."""
    from veomni_data import DataError, get_chat_template, multimodal_prompt
    from veomni_models import is_omni_folder

    folder = run / "hf_ckpt" if (run / "hf_ckpt").is_dir() else run
    if not is_omni_folder(folder):
        print(f"{run} holds no trained omni model: train one first, or name its folder with --run", file=sys.stderr)
        return USER_ERROR

    @ends_with_one_sentence(DataError)
    def answer() -> str:
        from veomni_recipes.evaluation import generate, load_exported

        model, processor = load_exported(folder)
        example = {
            "messages": [{"role": "user", "content": "<image>" * len(pictures) + question}],
            "images": [str(picture) for picture in pictures],
        }
        template = get_chat_template("default", processor.tokenizer)
        prompt = multimodal_prompt(example, image_token=processor.image_token, template=template)
        return generate(model, processor, [(prompt["text"], prompt["images"])])[0]

    print(answer())
    return 0


if __name__ == "__main__":
    sys.exit(main())
