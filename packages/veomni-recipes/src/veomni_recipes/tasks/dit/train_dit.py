"""Train a diffusion transformer of diffusers on pictures or videos that `prepare_dit` has encoded, whole or by LoRA.

    torchrun --nproc-per-node 2 -m veomni_recipes.tasks.dit.train_dit run.yaml --train.lr 1e-4

Read it from top to bottom: what it calls is a function of one of the five libraries or of a small module of this
package. To change something, copy the file (it runs from anywhere) and change it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from veomni_ckpt import CheckpointError, CheckpointManager, StopSignals
from veomni_config import ConfigError, DitRecipeConfig, dump_config, parse_args
from veomni_data import DataError, build_dataloader, build_dataset
from veomni_models import ModelError, add_adapters, initialize_adapters
from veomni_parallel import (
    ParallelError,
    ParallelPlan,
    build_parallelize_model,
    clip_grad_norm_,
    global_sum,
    gradient_sync,
    loss_scale,
)

from veomni_recipes.batch_counts import count_targets
from veomni_recipes.black_box import BlackBox
from veomni_recipes.charts import draw_loss
from veomni_recipes.data_checks import sizes_that_differ
from veomni_recipes.denoising import Denoising, measure_held_out, refuse_prompts_alone
from veomni_recipes.determinism import make_deterministic
from veomni_recipes.diffusion_data import read_sample, read_unconditional, shape_of, stack_samples
from veomni_recipes.diffusion_flops import DiffusionFlops
from veomni_recipes.diffusion_pipeline import (
    build_transformer,
    export_adapters,
    export_pipeline,
    load_encoders,
    load_scheduler,
    load_transformer,
    pipeline_folder,
    transformer_config,
)
from veomni_recipes.diffusion_sampling import Drawings
from veomni_recipes.diffusion_transformers import count_latent_tokens, family_of
from veomni_recipes.distributed import barrier, init_distributed, rank, to_device, world_size
from veomni_recipes.ema import ema_weights, update_ema
from veomni_recipes.errors import TrainingError
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
from veomni_recipes.supported import refuse_without_effect
from veomni_recipes.trackers import StepLog
from veomni_recipes.training_data import SKIPPED, left_out
from veomni_recipes.validation import Validation

WITHOUT_EFFECT = (
    *("data.datasets_type", "data.columns", "data.chat_template", "data.source_name"),
    *("model.foundation", "model.encoders", "model.decoders", "model.input_encoder", "model.output_encoder"),
    *("model.encode_target", "model.moe_implementation", "model.attn_implementation", "model.quantize_frozen"),
    *("train.balance_ranks", "train.dyn_bsz_count_mode", "train.dyn_bsz_margin"),
    *("train.bsz_warmup_ratio", "train.expert_parallel_size", "train.ep_outside", "train.enable_fused_loss"),
)


def build_model(cfg: DitRecipeConfig, config: dict[str, Any], base: Path | None, device: torch.device) -> nn.Module:
    """The transformer of diffusers, on meta or with its weights, with adapters if these are to learn."""
    model = build_transformer(config, seed=cfg.train.seed, on_meta=cfg.train.init_device == "meta")
    if cfg.train.init_device != "meta":
        load_transformer(model, base, device)
    if cfg.train.train_architecture == "lora":
        add_adapters(model, cfg.model.lora_config)
    return model


def fill_model(model: nn.Module, cfg: DitRecipeConfig, base: Path | None, device: torch.device) -> None:
    """Give a sharded transformer that was built on meta its weights, and draw its adapters."""
    if cfg.train.init_device == "meta":
        load_transformer(model, base, device)
    if cfg.train.train_architecture == "lora":
        initialize_adapters(getattr(model, "module", model), cfg.train.seed, device)


@ends_with_one_sentence(ConfigError, DataError, ModelError, ParallelError, CheckpointError, TrainingError)
def main(argv: list[str] | None = None) -> None:
    """Train, draw, and export."""
    cfg = parse_args(DitRecipeConfig, argv)
    refuse_without_effect(cfg, WITHOUT_EFFECT)
    make_deterministic(cfg.train)
    device = init_distributed()
    config, scheduler = transformer_config(cfg.model), load_scheduler(cfg.model)
    base = pipeline_folder(cfg.model.model_path) if cfg.model.model_path else None
    family = family_of(config["_class_name"])

    # data: latents and conditions that were encoded in advance
    count_tokens = partial(count_latent_tokens, config, config["_class_name"])
    encoded = partial(read_sample, count_tokens=count_tokens)
    train_data = build_dataset(cfg.data.train_path, transform=encoded, seed=cfg.train.seed)
    unconditional = {k: v.to(device) for k, v in read_unconditional(cfg.data.train_path).items()}
    plan = cfg.batch_plan(world_size(), len(train_data))
    steps_per_epoch = cfg.compute_train_steps(world_size(), len(train_data))
    total_steps = steps_per_epoch * cfg.train.num_train_epochs
    state = parallel_state(cfg.train, plan, device)

    # model: meta -> sharded -> weights, so that no rank ever holds all of it; or with its weights, then sharded
    model = build_model(cfg, config, base, device)
    parameters = sum(p.numel() for p in model.parameters())
    learnt = sum(p.numel() for p in model.parameters() if p.requires_grad)
    progress = Progress()
    recompute = cfg.train.enable_gradient_checkpointing
    meter = Meter(model, state, progress, recompute=recompute, flops=DiffusionFlops(config))
    units = ParallelPlan(shard_units=cfg.model.basic_modules or None, no_shard=family.whole)
    model = build_parallelize_model(model, state, plan=units, **wrapping(cfg.train))
    fill_model(model, cfg, base, device)
    predict = partial(family.predict, model, config)
    denoising = Denoising(predict, scheduler, unconditional, cfg.model.embedded_guidance, cfg.train)
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
    barrier()

    # rows of pictures of one size, as many as have max_seq_len latent tokens together
    rows: dict[str, Any] = {"collate": stack_samples, "bucket": shape_of if cfg.train.dyn_bsz else None}
    loader = build_dataloader(
        train_data,
        dp_rank=state.dp.get_local_rank(),
        dp_size=state.dp.size(),
        micro_batch_size=cfg.train.micro_batch_size,
        global_batch_size=plan.global_batch_size,
        max_seq_len=cfg.data.max_seq_len,
        packing=cfg.train.dyn_bsz,
        buffer_size=cfg.train.dyn_bsz_buffer_size,
        num_workers=cfg.data.num_workers,
        prefetch_factor=cfg.data.prefetch_factor,
        pin_memory=cfg.data.pin_memory,
        seed=cfg.train.seed,
        group=state.dp.get_group(),
        max_skipped=cfg.data.max_skipped,
        skipped_path=folder / SKIPPED,
        ledger=folder / "ledger",
        **rows,
    )
    stop, stopped = StopSignals().listen(), False
    checkpoints = CheckpointManager(
        folder / "checkpoints",
        keep_last=cfg.train.keep_last,
        async_save=cfg.train.save_async,
        trainable_only=cfg.train.train_architecture == "lora",
    )
    black_box = BlackBox(folder, loader, state, model)
    guard = Guard(cfg.train, black_box)

    # held-out data: prompts are drawn, and latents are validated on
    drawings, averaged = None, partial(ema_weights, optimizer)
    if cfg.data.eval_path is not None:
        decoder = load_encoders(base, config, cfg.model.labels, device, only_vae=True)
        prompts = build_dataset(cfg.data.eval_path, transform=encoded)
        refuse_prompts_alone(cfg, prompts[0])
        drawings = Drawings(cfg, model, config, scheduler, unconditional, state, decoder, prompts)
    measure = partial(measure_held_out, denoising, model, state)
    validation = Validation(cfg, train_data, model, state, rows=rows, measure=measure, weights=averaged)
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
    display.say(f"{parameters:,} parameters, of which {learnt:,} learn; {state.describe()}")
    if first:
        display.say(sizes_that_differ(train_data, cfg))
    display.say(f"{total_steps} steps of {plan.tokens_per_step:,} latent tokens, {plan.accumulation} batches a rank")
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

                # the loss is the mean square over the latent values of the whole step, over all ranks
                values = global_sum(torch.tensor(count_targets(micro_batches), device=device), state.dp)
                loss = torch.zeros((), device=device)
                black_box.begin(progress.step, micro_batches)
                meter.begin(micro_batches)
                for i, batch in enumerate(micro_batches):
                    with gradient_sync(model, enabled=i == len(micro_batches) - 1), offloading(cfg.train):
                        part = denoising.loss(to_device(batch, device), progress.step) / values
                        (part * loss_scale(state)).backward()
                    loss += part.detach()
                    meter.add(part)
                loss = global_sum(loss, state.dp)
                grad_norm = clip_grad_norm_(model, cfg.train.max_grad_norm, state)
                if guard.allows(progress.step, loss, grad_norm):
                    optimizer.step()
                    update_ema(optimizer, cfg.train.ema_decay)
                optimizer.zero_grad()

                log.write(meter.end(loss=loss, grad_norm=grad_norm, lr=lr))
                log.validated(validation.after_step(progress))
                if drawings is not None and cfg.train.sample_steps and progress.step % cfg.train.sample_steps == 0:
                    with averaged():
                        drawings.sheet(folder / "samples" / f"step_{progress.step:06}.png")
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

    # the end: a folder that diffusers loads, and what the model draws
    with averaged():
        if cfg.train.save_hf_weights and cfg.train.train_architecture == "lora":
            export_adapters(model, folder / "hf_ckpt", family=family, base=base)
        elif cfg.train.save_hf_weights:
            labels = cfg.model.labels
            export_pipeline(model, folder / "hf_ckpt", family=family, scheduler=scheduler, base=base, labels=labels)
        if drawings is not None:
            drawings.all(folder)
    if first:
        figures = read_metrics(folder), folder / "loss.png", read_metrics(folder, VALIDATION)
        draw_loss(*figures, unit="mean square")
        summary = {
            "seconds": seconds_since_launch(),
            "startup_seconds": startup,
            "training_seconds": trained - startup,
            "left_out_samples": lost,
            "steps": progress.step,
            "tokens": progress.tokens,
            "tokens_per_second": meter.tokens_per_second,
            "parameters": parameters,
            "trained_parameters": learnt,
            "world_size": world_size(),
        }
        write_json(folder / "summary.json", summary)
        write_card(folder, cfg, "train_dit", pipeline=family.pipeline)
        say_goodbye(folder, summary)


if __name__ == "__main__":
    main()
