"""Train a language model on preferences: DPO, IPO, SimPO and ORPO, of all weights or by LoRA.

    torchrun --nproc-per-node 2 -m veomni_recipes.tasks.train_dpo run.yaml --train.dpo_beta 0.1

The reference model of DPO and IPO is a frozen copy, sharded as the model is; with LoRA it is the model without its
adapters. Read it from top to bottom: what it calls is a function of one of the five libraries or of a small module of
this package. To change something, copy the file (it runs from anywhere) and change it.
"""

from __future__ import annotations

from collections.abc import Sized

import torch
from veomni_ckpt import CheckpointError, CheckpointManager, StopSignals
from veomni_config import ConfigError, DPORecipeConfig, dump_config, parse_args
from veomni_data import DataError
from veomni_models import ModelError, has_adapters, plan_for, use_log_probs
from veomni_parallel import (
    ParallelError,
    ParallelPlan,
    build_parallelize_model,
    clip_grad_norm_,
    global_sum,
    gradient_sync,
    loss_scale,
)

from veomni_recipes.black_box import BlackBox
from veomni_recipes.charts import draw_loss
from veomni_recipes.data_checks import sizes_that_differ
from veomni_recipes.determinism import make_deterministic
from veomni_recipes.distributed import barrier, init_distributed, rank, to_device, world_size
from veomni_recipes.ema import ema_weights, update_ema
from veomni_recipes.errors import TrainingError
from veomni_recipes.frozen import build_frozen, spread_frozen
from veomni_recipes.guard import Guard
from veomni_recipes.launch import ends_with_one_sentence, note_stop, seconds_since_launch
from veomni_recipes.layout import offloading, parallel_state, wrapping
from veomni_recipes.memory import tidied_together
from veomni_recipes.meter import Meter
from veomni_recipes.model_card import write_card
from veomni_recipes.optimization import build_optimizer, learning_rate, set_learning_rate
from veomni_recipes.preference import HeldOutPairs, compare, count_pairs, describe, pair_sums
from veomni_recipes.profiling import traced
from veomni_recipes.progress import Display, Progress
from veomni_recipes.run_folder import VALIDATION, open_run_folder, read_metrics, say_goodbye, write_json
from veomni_recipes.supported import DPO, refuse_without_effect
from veomni_recipes.tasks.train_torch import build_model, read_data
from veomni_recipes.text_data import describe_text, text_transform
from veomni_recipes.trackers import StepLog
from veomni_recipes.training_data import build_rows, left_out
from veomni_recipes.weights import export, fill_foundation

Config = DPORecipeConfig


@ends_with_one_sentence(ConfigError, DataError, ModelError, ParallelError, CheckpointError, TrainingError)
def main(argv: list[str] | None = None) -> None:
    """Train, and export."""
    cfg = parse_args(Config, argv)
    refuse_without_effect(cfg, DPO)
    make_deterministic(cfg.train)
    device = init_distributed()

    # data: pairs of answers, each a sample of two segments -> the packed micro-batches of one optimizer step
    tokenizer, train_data = read_data(cfg)
    samples = len(train_data) if isinstance(train_data, Sized) else None
    plan = cfg.batch_plan(world_size(), samples)
    steps_per_epoch = cfg.compute_train_steps(world_size(), samples)
    total_steps = steps_per_epoch * cfg.train.num_train_epochs
    state = parallel_state(cfg.train, plan, device)

    # model: meta -> sharded -> weights, so that no rank ever holds all of it; or with its weights, then sharded
    model = build_model(cfg, tokenizer, device)
    parameters, hidden_size = sum(p.numel() for p in model.parameters()), model.config.get_text_config().hidden_size
    copied = cfg.train.uses_reference and not has_adapters(model)  # without its adapters the model is the reference
    reference = build_frozen(cfg, device) if copied else None
    for each in filter(None, (model, reference)):
        use_log_probs(each)  # what `loss` is from here on
    progress = Progress()
    meter = Meter(model, state, progress, recompute=cfg.train.enable_gradient_checkpointing)
    model = build_parallelize_model(
        model,
        state,
        plan=ParallelPlan(shard_units=[*plan_for(model)["shard_units"], *cfg.model.basic_modules] or None),
        **wrapping(cfg.train),
    )
    fill_foundation(model, cfg, device)
    if reference is not None:
        reference = spread_frozen(reference, cfg, state, device)
    optimizer = build_optimizer(
        model,
        lr=cfg.train.lr,
        weight_decay=cfg.train.weight_decay,
        no_decay_modules=cfg.train.no_decay_modules,
        no_decay_params=cfg.train.no_decay_params,
        optimizer=cfg.train.optimizer,
        muon=cfg.train.muon_options(),
    )

    # the run folder: a run that goes on finds its place in it
    folder, first, resume_from = cfg.train.output_dir, rank() == 0, cfg.train.load_checkpoint_path
    if first:
        open_run_folder(folder, resume=resume_from is not None)
        dump_config(cfg, folder / "config.yaml")
        tokenizer.save_pretrained(folder / "model_assets")
    barrier()

    # rows of samples, each of which is written down in the ledger
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    loader = build_rows(
        cfg,
        train_data,
        state,
        plan,
        total_steps=total_steps,
        hidden_size=hidden_size,
        pad_token_id=pad_token_id,
        folder=folder,
        description=describe_text(cfg, folder / "model_assets", pad_token_id),
    )
    stop, stopped = StopSignals().listen(), False
    checkpoints = CheckpointManager(
        folder / "checkpoints",
        keep_last=cfg.train.keep_last,
        async_save=cfg.train.save_async,
        trainable_only=cfg.train.train_architecture == "lora",
    )
    black_box = BlackBox(folder, loader, state, model, [tokenizer])
    guard = Guard(cfg.train, black_box)
    held_out = HeldOutPairs(cfg, text_transform(cfg.data, tokenizer), state, pad_token_id)
    if resume_from is not None:
        saved = checkpoints.load(resume_from, model, optimizer)
        if saved is not None:
            progress.restore(saved, loader, guard=guard)

    def save() -> None:
        log.write(meter.flush())
        checkpoints.save(progress.step, model, optimizer, progress.state(loader, guard=guard))

    def judge() -> dict[str, float]:
        with ema_weights(optimizer):
            return held_out.judge(model, reference)

    display = Display(total_steps, progress.step, shown=first)
    log = StepLog(cfg, progress.step, display, on=first)
    display.say(f"{parameters:,} parameters; {state.describe()}")
    if first:
        display.say(sizes_that_differ(train_data, cfg))
    display.say(f"{total_steps} steps of {plan.tokens_per_step:,} tokens, {plan.accumulation} micro-batches a rank")
    before = judge() if not progress.step else {}
    display.say(describe(before, "before"))
    startup = seconds_since_launch()
    meter.watch(model, loader)

    with (
        black_box.watch(cfg.train.hang_timeout),
        traced(cfg.train, folder, progress.step) as trace,
        tidied_together(cfg.train) as tidy,
    ):
        while progress.epoch < cfg.train.num_train_epochs:
            for micro_batches in progress.steps(loader, steps_per_epoch):
                lr = learning_rate(progress.step, total_steps, cfg.train)
                set_learning_rate(optimizer, lr)

                # the loss is the sum over pairs divided by those of the whole step, over all ranks
                pairs = max(1, global_sum(sum(map(count_pairs, micro_batches)), state.dp))
                sums = torch.zeros(5, dtype=torch.float64, device=device)
                black_box.begin(progress.step, micro_batches)
                meter.begin(micro_batches)
                for i, batch in enumerate(micro_batches):
                    with gradient_sync(model, enabled=i == len(micro_batches) - 1), offloading(cfg.train):
                        compared = compare(model, reference, to_device(batch, device), state, cfg.train)
                        (compared.losses.sum() / pairs * loss_scale(state)).backward()
                    sums += pair_sums(compared)
                loss, margin, accuracy, ranking, _ = global_sum(sums, state.dp) / pairs
                grad_norm = clip_grad_norm_(model, cfg.train.max_grad_norm, state)
                if guard.allows(progress.step, loss, grad_norm):
                    optimizer.step()
                    update_ema(optimizer, cfg.train.ema_decay)
                optimizer.zero_grad()

                rewards = {"margin": margin.item(), "accuracy": accuracy.item(), "ranking": ranking.item()}
                log.write(meter.end(loss=loss, grad_norm=grad_norm, lr=lr, pairs=pairs, **rewards))
                if cfg.train.eval_steps and progress.step % cfg.train.eval_steps == 0:
                    log.validated({"step": progress.step, **judge()})
                trace()
                tidy(progress.step)
                stopped = stop.requested(device)
                save_now = cfg.train.save_steps and progress.step % cfg.train.save_steps == 0
                if stopped or save_now:
                    save()
                if stopped:
                    break
            if stopped:
                break
            progress.end_epoch(loader)
            if cfg.train.eval_epochs and progress.epoch % cfg.train.eval_epochs == 0:
                log.validated({"step": progress.step, **judge()})
            if cfg.train.save_epochs and progress.epoch % cfg.train.save_epochs == 0:
                save()
    log.write(meter.flush())
    checkpoints.close()
    if stopped:
        display.say(f"told to stop: saved at step {progress.step}; --train.load_checkpoint_path=auto goes on")
        log.close()
        if first:
            note_stop()
        return
    if progress.step < total_steps:
        size = progress.tokens // progress.epoch
        display.say(f"the data ended after {progress.step} of {total_steps} steps: set data.train_size to {size}")
    lost, sentence = left_out(loader, folder)
    display.say(sentence)
    trained = seconds_since_launch()
    after = judge()
    display.say(describe(after, "after"))
    log.close()

    # the end: a Hugging Face folder
    if cfg.train.save_hf_weights:
        with ema_weights(optimizer):
            export(model, folder, cfg, assets=[tokenizer])
    if first:
        draw_loss(read_metrics(folder), folder / "loss.png", read_metrics(folder, VALIDATION))
        summary = {
            "seconds": seconds_since_launch(),
            "startup_seconds": startup,
            "training_seconds": trained - startup,
            "left_out_samples": lost,
            "steps": progress.step,
            "tokens": progress.tokens,
            "tokens_per_second": meter.tokens_per_second,
            "parameters": parameters,
            "world_size": world_size(),
            "held_out": {"before": before, "after": after} if after else {},
        }
        write_json(folder / "summary.json", summary)
        write_card(folder, cfg, "train_dpo")
        say_goodbye(folder, summary)


if __name__ == "__main__":
    main()
