from __future__ import annotations

import pytest
from veomni_config import ConfigError, OmniRecipeConfig, parse_args
from veomni_recipes.supported import OMNI, refuse_without_effect


@pytest.mark.parametrize(
    "change", ["--train.ep_outside=true", "--train.train_architecture=lora", "--train.expert_parallel_size=2"]
)
def test_a_key_that_the_recipe_does_not_act_on_is_refused_by_name(change: str, arguments: list[str]) -> None:
    cfg = parse_args(OmniRecipeConfig, [*arguments, "--train.output_dir=unused", change])
    with pytest.raises(ConfigError, match=change.removeprefix("--").split("=")[0] + ".*no effect in this recipe"):
        refuse_without_effect(cfg, OMNI)


def test_what_ships_is_acted_on(arguments: list[str]) -> None:
    refuse_without_effect(parse_args(OmniRecipeConfig, [*arguments, "--train.output_dir=unused"]), OMNI)


def test_an_evaluation_needs_the_exported_model(arguments: list[str]) -> None:
    cfg = parse_args(OmniRecipeConfig, [*arguments, "--train.output_dir=unused", "--data.eval_path=some.jsonl"])
    with pytest.raises(ConfigError, match=r"data.eval_path.*set train.save_hf_weights to true"):
        refuse_without_effect(cfg, OMNI)
