"""Train a tokenizer of pictures, with which an omni model then draws: a VQ autoencoder, on those of conversations.

    torchrun --nproc-per-node 2 -m veomni_recipes.tasks.omni.train_image_tokenizer run.yaml --train.lr 1e-3

It learns from the pictures that the answers of `data.train_path` draw, `train.global_batch_size` conversations a step.
`model.decoders.image` says what it is; `OUTPUT/hf_ckpt` is the `model_path` of the omni recipe's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler
from veomni_config import ConfigError, OmniRecipeConfig, Problem, dump_config, parse_args
from veomni_data import DataError, Generation, build_dataset, get_chat_template, multimodal_prompt
from veomni_models import ModelError, VQTokenizer, build_omni_processor, build_picture_decoder
from veomni_parallel import (
    ParallelError,
    build_parallelize_model,
    global_sum,
    init_parallel_state,
    loss_scale,
    seed_ranks,
)

from veomni_recipes.charts import draw_pairs
from veomni_recipes.distributed import init_distributed, rank, world_size
from veomni_recipes.launch import ends_with_one_sentence, seconds_since_launch
from veomni_recipes.optimization import build_optimizer, learning_rate, set_learning_rate
from veomni_recipes.run_folder import Metrics, open_run_folder, write_json

_RECENT = 0.98  # how much of the count of a code's uses is left after a step
_RESTARTS = 20  # steps from one restart of codes that are not used to the next
_SETTLED = 0.7  # the share of the steps after which codes are no longer restarted


@ends_with_one_sentence(ConfigError, DataError, ModelError, ParallelError)
def main(argv: list[str] | None = None) -> None:
    """Train, export, and reconstruct held-out pictures."""
    cfg = parse_args(OmniRecipeConfig, argv)
    rows_a_step, total = refuse_without_effect(cfg)
    device = init_distributed()
    state = init_parallel_state(device_type=device.type)
    seed_ranks(cfg.train.seed, state)

    # data: the pictures that the answers of conversations draw
    processor = build_omni_processor(cfg.model.tokenizer_path, decoders=cfg.model.decoders)
    generation = Generation(**processor.generation)
    template = get_chat_template(cfg.data.chat_template, processor.tokenizer)
    pictures = partial(pictures_of, generation=generation, template=template, image_keys=cfg.data.image_keys)
    rows = build_dataset(cfg.data.train_path, transform=pictures, root=cfg.data.root)

    tokenizer = build_picture_decoder(cfg.model.decoders["image"], seed=cfg.train.seed).to(device).train()
    tokenizer.tidy_codebook()
    model = build_parallelize_model(tokenizer, state, mode="ddp")
    optimizer = build_optimizer(model, lr=cfg.train.lr, weight_decay=cfg.train.weight_decay)
    folder, first = cfg.train.output_dir, rank() == 0
    if first:
        open_run_folder(folder, resume=False)
        dump_config(cfg, folder / "config.yaml")
    metrics = Metrics(folder, 0) if first else None
    uses = torch.ones(tokenizer.num_codes, device=device)
    began = time.monotonic()

    for step, batch in enumerate(islice(batches(rows, rows_a_step // world_size(), cfg.train.seed, device), total), 1):
        lr = learning_rate(step, total, cfg.train)
        set_learning_rate(optimizer, lr)
        # the loss is that of the pictures of all ranks, of which this one may have none
        seen = global_sum(len(batch), state.dp)
        given = batch if len(batch) else torch.zeros(1, 3, tokenizer.image_size, tokenizer.image_size, device=device)
        out = model(given)
        error = F.mse_loss(out.decoded_pixel_values, given)
        loss = (error + out.embedding_loss) * (len(batch) / seen)
        (loss * loss_scale(state)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        counts = torch.bincount(out.codes[: len(batch)].flatten(), minlength=tokenizer.num_codes).float()
        uses = uses * _RECENT + global_sum(counts, state.dp)
        restart = step % _RESTARTS == 0 and step <= _SETTLED * total
        tokenizer.tidy_codebook((uses < 1) if restart else None, given)
        agree(tokenizer, state)
        if metrics is not None:
            line = {"step": step, "loss": loss.item(), "mse": error.item(), "lr": lr, "codes": int((uses >= 1).sum())}
            metrics.write(line)
            if step % max(1, total // 20) == 0:
                print(f"step {step}/{total}: mse {error.item():.4f}, {line['codes']} codes in use", flush=True)

    if first:
        tokenizer.eval().save_pretrained(folder / "hf_ckpt")
        summary = {"steps": total, "codes_in_use": int((uses >= 1).sum()), "codes": tokenizer.num_codes}
        if cfg.data.eval_path is not None:
            held_out = build_dataset(cfg.data.eval_path, transform=pictures, root=cfg.data.root)
            originals = join([held_out[i] for i in range(len(held_out))]).to(device)
            made = torch.cat([tokenizer.pictures(tokenizer.codes(part)) for part in originals.split(256)])
            summary["held_out_rmse"] = F.mse_loss(made, originals).sqrt().item()
            draw_pairs(originals.cpu(), made.cpu(), folder / "reconstructions.png")
        summary |= {"seconds": seconds_since_launch(), "training_seconds": time.monotonic() - began}
        write_json(folder / "summary.json", summary)
        print(f"{summary}\ntokenizer: {folder / 'hf_ckpt'}", flush=True)


def refuse_without_effect(cfg: OmniRecipeConfig) -> tuple[int, int]:
    """ConfigError for what this short recipe needs or does not do; else conversations a step, and steps."""
    rows, steps = cfg.train.global_batch_size or 0, cfg.train.max_steps or 0
    problems = []
    if "image" not in cfg.model.decoders:
        problems.append(Problem("model.decoders", "there is no image tokenizer to train: set model.decoders.image"))
    if not steps:
        problems.append(Problem("train.max_steps", "must say how many steps are trained"))
    if not rows or rows % world_size():
        text = f"{rows} must be a number of conversations that {world_size()} ranks divide"
        problems.append(Problem("train.global_batch_size", text))
    if cfg.train.load_checkpoint_path is not None or cfg.train.save_steps:
        problems.append(Problem("train.save_steps", "this recipe is short and writes no checkpoints: leave it at 0"))
    if problems:
        raise ConfigError(problems)
    return rows, steps


def pictures_of(
    example: Mapping[str, Any], *, generation: Generation, template: Any, image_keys: str = "images"
) -> Tensor:
    """The pictures that the answer of a conversation draws, [n, 3, S, S] in -1 .. 1; n may be 0."""
    prompt = multimodal_prompt(
        example, image_token="<image>", template=template, generation=generation, image_keys=image_keys
    )
    drawn = prompt.get("targets", [])
    if not drawn:
        return torch.empty(0, 3, 1, 1)
    pixels: Tensor = generation.image_processor(images=drawn, return_tensors="pt")["pixel_values"]
    return pixels


def batches(rows: Any, size: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    """Pictures of `size` rows of this rank's, for ever, in another order each epoch."""
    sampler: DistributedSampler[Any] = DistributedSampler(rows, world_size(), rank(), seed=seed, drop_last=True)
    for epoch in count():
        sampler.set_epoch(epoch)
        yield from (part.to(device) for part in DataLoader(rows, size, sampler=sampler, collate_fn=join))


def join(parts: Sequence[Tensor]) -> Tensor:
    """The pictures of several rows."""
    some = [part for part in parts if len(part)]
    return torch.cat(some) if some else parts[0]


def agree(tokenizer: VQTokenizer, state: Any) -> None:
    """Codes that were restarted are those of the first rank on all ranks."""
    if state.dp.size() > 1:
        torch.distributed.broadcast(tokenizer.quantize.embedding.weight.data, src=0)


if __name__ == "__main__":
    main()
