"""Train a student on plain text or on conversations with the whole distribution of a teacher for each token.

    torchrun --nproc-per-node 2 -m veomni_recipes.tasks.train_distill run.yaml --model.teacher_path teacher

The teacher is frozen and sharded as the student is; the logits of neither ever exist as a whole.

Read it from top to bottom: what it calls is a function of one of the five libraries or of a small module of this
package. To change something, copy the file (it runs from anywhere) and change it.
"""

from __future__ import annotations

from collections.abc import Sized
from functools import partial

import torch
from veomni_ckpt import CheckpointError, CheckpointManager, StopSignals
from veomni_config import ConfigError, DistillRecipeConfig, dump_config, parse_args
from veomni_data import DataError, slice_for_sequence_parallel
from veomni_models import Distillation, ModelError, plan_for
from veomni_parallel import (
    ParallelError,
    ParallelPlan,
    build_parallelize_model,
    clip_grad_norm_,
    count_targets,
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
from veomni_recipes.frozen import build_frozen, spread_frozen, teacher_of
from veomni_recipes.guard import Guard
from veomni_recipes.launch import ends_with_one_sentence, note_stop, seconds_since_launch
from veomni_recipes.layout import offloading, parallel_state, wrapping
from veomni_recipes.memory import tidied_together
from veomni_recipes.meter import Meter
from veomni_recipes.model_card import write_card
from veomni_recipes.optimization import build_optimizer, learning_rate, set_learning_rate
from veomni_recipes.profiling import traced
from veomni_recipes.progress import Display, Progress
from veomni_recipes.run_folder import VALIDATION, open_run_folder, read_metrics, say_goodbye, write_json
from veomni_recipes.supported import DISTILL, refuse_without_effect
from veomni_recipes.tasks.train_torch import build_model, read_data
from veomni_recipes.text_data import describe_text
from veomni_recipes.trackers import StepLog
from veomni_recipes.training_data import build_rows, left_out
from veomni_recipes.validation import Validation
from veomni_recipes.weights import export, fill_foundation

Config = DistillRecipeConfig


@ends_with_one_sentence(ConfigError, DataError, ModelError, ParallelError, CheckpointError, TrainingError)
def main(argv: list[str] | None = None) -> None:
    """Train, and export."""
    cfg = parse_args(Config, argv)
    refuse_without_effect(cfg, DISTILL)
    make_deterministic(cfg.train)
    device = init_distributed()

    # data: texts or conversations -> samples -> the packed micro-batches of one optimizer step
    tokenizer, train_data = read_data(cfg)
    samples = len(train_data) if isinstance(train_data, Sized) else None
    plan = cfg.batch_plan(world_size(), samples)
    steps_per_epoch = cfg.compute_train_steps(world_size(), samples)
    total_steps = steps_per_epoch * cfg.train.num_train_epochs
    state = parallel_state(cfg.train, plan, device)

    # model: meta -> sharded -> weights, so that no rank ever holds all of it; or with its weights, then sharded
    model = build_model(cfg, tokenizer, device)
    parameters, hidden_size = sum(p.numel() for p in model.parameters()), model.config.get_text_config().hidden_size
    teacher = build_frozen(teacher_of(cfg), device)
    distillation = Distillation(
        model, teacher, temperature=cfg.train.distill_temperature, weight=cfg.train.distill_weight
    )  # what `loss` is from here on
    progress = Progress()
    meter = Meter(model, state, progress, recompute=cfg.train.enable_gradient_checkpointing)
    model = build_parallelize_model(
        model,
        state,
        plan=ParallelPlan(shard_units=[*plan_for(model)["shard_units"], *cfg.model.basic_modules] or None),
        **wrapping(cfg.train),
    )
    fill_foundation(model, cfg, device)
    distillation.begin(model, spread_frozen(teacher, teacher_of(cfg), state, device))
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
    validation = Validation(
        cfg,
        train_data,
        model,
        state,
        weights=partial(ema_weights, optimizer),
        pad_token_id=pad_token_id,
    )
    if resume_from is not None:
        saved = checkpoints.load(resume_from, model, optimizer)
        if saved is not None:
            progress.restore(saved, loader, guard=guard, validation=validation)

    def save() -> None:
        log.write(meter.flush())
        checkpoints.save(progress.step, model, optimizer, progress.state(loader, guard=guard, validation=validation))
        if validation.is_best:
            validation.keep_best(checkpoints)

    display = Display(total_steps, progress.step, shown=first)
    log = StepLog(cfg, progress.step, display, on=first)
    display.say(f"{parameters:,} parameters; {state.describe()}")
    if first:
        display.say(sizes_that_differ(train_data, cfg))
    display.say(f"{total_steps} steps of {plan.tokens_per_step:,} tokens, {plan.accumulation} micro-batches a rank")
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

                # the loss is the sum over target tokens divided by those of the whole step, over all ranks
                targets = global_sum(torch.tensor(count_targets(micro_batches), device=device), state.dp)
                loss = torch.zeros((), device=device)
                black_box.begin(progress.step, micro_batches)
                meter.begin(micro_batches)
                for i, batch in enumerate(micro_batches):
                    batch = slice_for_sequence_parallel(
                        to_device(batch, device), state.sp.get_local_rank(), state.sp.size(), pad_token_id=pad_token_id
                    )
                    with gradient_sync(model, enabled=i == len(micro_batches) - 1), offloading(cfg.train):
                        out = model(**batch, num_items_in_batch=targets, use_cache=False)
                        (out.loss * loss_scale(state)).backward()
                    loss += out.loss.detach()
                    meter.add(out)
                loss = global_sum(loss, state.loss)
                grad_norm = clip_grad_norm_(model, cfg.train.max_grad_norm, state)
                if guard.allows(progress.step, loss, grad_norm):
                    optimizer.step()
                    update_ema(optimizer, cfg.train.ema_decay)
                optimizer.zero_grad()

                log.write(meter.end(loss=loss, grad_norm=grad_norm, lr=lr))
                log.validated(validation.after_step(progress))
                trace()
                tidy(progress.step)
                stopped = stop.requested(device)
                save_now = cfg.train.save_steps and progress.step % cfg.train.save_steps == 0
                if stopped or save_now or validation.is_best:
                    save()
                if stopped:
                    break
            if stopped:
                break
            progress.end_epoch(loader)
            log.validated(validation.after_epoch(progress))
            if validation.is_best or (cfg.train.save_epochs and progress.epoch % cfg.train.save_epochs == 0):
                save()
    log.write(meter.flush())
    if cfg.train.export_checkpoint == "best" and validation.best_step is not None and not stopped:
        checkpoints.load(validation.best_step, model, optimizer)
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
    log.close()
    trained = seconds_since_launch()

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
        }
        write_json(folder / "summary.json", summary)
        write_card(folder, cfg, "train_distill")
        say_goodbye(folder, summary)


if __name__ == "__main__":
    main()
