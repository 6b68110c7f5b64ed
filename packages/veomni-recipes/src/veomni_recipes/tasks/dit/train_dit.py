"""Train a diffusion transformer of diffusers on pictures or videos that `prepare_dit` has encoded, whole or by LoRA.

    torchrun --nproc-per-node 2 -m veomni_recipes.tasks.dit.train_dit run.yaml --train.lr 1e-4

Read it from top to bottom: what it calls is a function of one of the five libraries or of a small module of this
package. To change something, copy the file (it runs from anywhere) and change it.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from veomni_ckpt import CheckpointError, CheckpointManager, StopSignals
from veomni_config import ConfigError, DitRecipeConfig, dump_config, parse_args
from veomni_data import DataError, build_dataloader, build_dataset
from veomni_models import ModelError, add_adapters, initialize_adapters
from veomni_parallel import (
    ParallelError,
    ParallelPlan,
    ParallelState,
    Watchdog,
    build_parallelize_model,
    clip_grad_norm_,
    global_sum,
    gradient_sync,
    loss_scale,
)

from veomni_recipes.charts import draw_loss
from veomni_recipes.determinism import make_deterministic
from veomni_recipes.diffusion import add_noise, draw, drop_conditions, noise_shift
from veomni_recipes.diffusion_data import conditions_of, read_sample, read_unconditional, shape_of, stack_samples
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
from veomni_recipes.launch import ends_with_one_sentence, note_stop, seconds_since_launch
from veomni_recipes.layout import offloading, parallel_state, wrapping
from veomni_recipes.memory import tidied_together
from veomni_recipes.optimization import build_optimizer, learning_rate, set_learning_rate
from veomni_recipes.profiling import traced
from veomni_recipes.progress import Display, Progress
from veomni_recipes.run_folder import open_run_folder, read_metrics, say_goodbye, write_json
from veomni_recipes.supported import refuse_without_effect
from veomni_recipes.trackers import StepLog
from veomni_recipes.training_data import left_out

WITHOUT_EFFECT = (
    *("data.datasets_type", "data.columns", "data.chat_template", "data.source_name"),
    *("model.foundation", "model.encoders", "model.decoders", "model.input_encoder", "model.output_encoder"),
    *("model.encode_target", "model.moe_implementation", "model.attn_implementation"),
    *("train.vit_lr", "train.balance_ranks", "train.dyn_bsz_count_mode", "train.dyn_bsz_margin"),
    *("train.bsz_warmup_ratio", "train.expert_parallel_size", "train.ep_outside", "train.enable_fused_loss"),
    *("train.bad_step", "train.spike_sigma", "train.best_metric", "train.export_checkpoint"),
)


def build_model(cfg: DitRecipeConfig, state: ParallelState, base: Path | None) -> nn.Module:
    """The transformer over ranks: drawn by the seed, or meta -> sharded -> weights, so that no rank holds all of it."""
    config, on_meta = transformer_config(cfg.model), cfg.train.init_device == "meta"
    model = build_transformer(config, seed=cfg.train.seed, on_meta=on_meta)
    if not on_meta:
        load_transformer(model, base, state.device)
    if cfg.train.train_architecture == "lora":
        add_adapters(model, cfg.model.lora_config)
    units = ParallelPlan(shard_units=cfg.model.basic_modules or None, no_shard=family_of(config["_class_name"]).whole)
    model = build_parallelize_model(model, state, plan=units, **wrapping(cfg.train))
    if on_meta:
        load_transformer(model, base, state.device)
    if cfg.train.train_architecture == "lora":
        initialize_adapters(getattr(model, "module", model), cfg.train.seed, state.device)
    return model


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

    model = build_model(cfg, state, base)
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    predict = partial(family.predict, model, config)
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
    loader = build_dataloader(
        train_data,
        dp_rank=state.dp.get_local_rank(),
        dp_size=state.dp.size(),
        micro_batch_size=cfg.train.micro_batch_size,
        global_batch_size=plan.global_batch_size,
        max_seq_len=cfg.data.max_seq_len,
        packing=cfg.train.dyn_bsz,
        bucket=shape_of if cfg.train.dyn_bsz else None,
        buffer_size=cfg.train.dyn_bsz_buffer_size,
        num_workers=cfg.data.num_workers,
        prefetch_factor=cfg.data.prefetch_factor,
        pin_memory=cfg.data.pin_memory,
        collate=stack_samples,
        seed=cfg.train.seed,
        group=state.dp.get_group(),
        max_skipped=cfg.data.max_skipped,
        skipped_path=folder / "skipped.jsonl",
        ledger=folder / "ledger",
    )
    stop, stopped = StopSignals().listen(), False
    checkpoints = CheckpointManager(
        folder / "checkpoints", keep_last=cfg.train.keep_last, async_save=cfg.train.save_async
    )
    progress = Progress()
    if resume_from is not None:
        saved = checkpoints.load(resume_from, model, optimizer)
        if saved is not None:
            progress.restore(saved, loader)
    drawings = None
    if cfg.data.eval_path is not None:
        decoder = load_encoders(base, config, cfg.model.labels, device, only_vae=True)
        prompts = build_dataset(cfg.data.eval_path, transform=encoded)
        drawings = Drawings(cfg, model, config, scheduler, unconditional, state, decoder, prompts)
    display = Display(total_steps, progress.step, shown=first)
    log = StepLog(cfg, progress.step, display, on=first)
    display.say(f"{parameters:,} parameters, of which {trained:,} learn; {state.describe()}")
    display.say(f"{total_steps} steps of {plan.tokens_per_step:,} latent tokens, {plan.accumulation} batches a rank")
    startup = seconds_since_launch()

    with ExitStack() as around:
        trace = around.enter_context(traced(cfg.train, folder, progress.step))
        tidy = around.enter_context(tidied_together(cfg.train))
        timeout = cfg.train.hang_timeout
        beat = around.enter_context(Watchdog(timeout)).beat if timeout else str
        while progress.epoch < cfg.train.num_train_epochs:
            for micro_batches in progress.steps(loader, steps_per_epoch):
                lr = learning_rate(progress.step, total_steps, cfg.train)
                set_learning_rate(optimizer, lr)

                # the loss is the mean square over the latent values of the whole step, over all ranks
                values = global_sum(sum(batch["latents"].numel() for batch in micro_batches), state.dp)
                loss = torch.zeros((), device=device)
                for i, batch in enumerate(micro_batches):
                    draws = draw(
                        batch["ids"],
                        batch["latents"].shape[1:],
                        seed=cfg.train.seed,
                        step=progress.step,
                        sampling=cfg.train.timestep_sampling,
                        logit_mean=cfg.train.logit_mean,
                        logit_std=cfg.train.logit_std,
                        condition_dropout=cfg.train.condition_dropout,
                    )
                    shift = cfg.train.timestep_shift or noise_shift(scheduler, batch["tokens"] // len(batch["ids"]))
                    batch, noise, time = to_device(batch, device), draws.noise.to(device), draws.time.to(device)
                    noisy, timestep, target = add_noise(scheduler, batch["latents"].float(), noise, time, shift)
                    conditions = drop_conditions(conditions_of(batch), unconditional, draws.dropped.to(device))
                    with gradient_sync(model, enabled=i == len(micro_batches) - 1), offloading(cfg.train):
                        predicted = predict(noisy, timestep, conditions, cfg.model.embedded_guidance)
                        part = F.mse_loss(predicted.float(), target, reduction="sum") / values
                        (part * loss_scale(state)).backward()
                    loss += part.detach()
                grad_norm = clip_grad_norm_(model, cfg.train.max_grad_norm, state)
                numbers = {"loss": global_sum(loss, state.dp).item(), "grad_norm": grad_norm.item()}
                if not all(map(math.isfinite, numbers.values())):
                    where = f"{folder / 'ledger'} says which samples were in it"
                    raise TrainingError(f"step {progress.step} is not applied and the run ends: {numbers}; {where}")
                optimizer.step()
                update_ema(optimizer, cfg.train.ema_decay)
                optimizer.zero_grad()

                tokens, samples = (
                    global_sum(sum(sizes), state.dp)
                    for sizes in ([b["tokens"] for b in micro_batches], [len(b["ids"]) for b in micro_batches])
                )
                log.write([progress.measure(tokens=tokens, samples=samples, lr=lr, **numbers)])
                if drawings is not None and cfg.train.sample_steps and progress.step % cfg.train.sample_steps == 0:
                    with ema_weights(optimizer):
                        drawings.sheet(folder / "samples" / f"step_{progress.step:06}.png")
                beat(f"step {progress.step}")
                trace()
                tidy(progress.step)
                stopped = stop.requested(device)
                if stopped or (cfg.train.save_steps and progress.step % cfg.train.save_steps == 0):
                    checkpoints.save(progress.step, model, optimizer, progress.state(loader))
                if stopped:
                    break
            if stopped:
                break
            progress.end_epoch(loader)
            if cfg.train.save_epochs and progress.epoch % cfg.train.save_epochs == 0:
                checkpoints.save(progress.step, model, optimizer, progress.state(loader))
    checkpoints.close()
    if stopped:
        display.say(f"told to stop: saved at step {progress.step}; --train.load_checkpoint_path=auto goes on")
        log.close()
        if first:
            note_stop()
        return
    lost, sentence = left_out(loader, folder)
    display.say(sentence)
    log.close()
    trained_at = seconds_since_launch()

    # the end: a folder that diffusers loads, and what the model draws
    with ema_weights(optimizer):
        if cfg.train.save_hf_weights and cfg.train.train_architecture == "lora":
            export_adapters(model, folder / "hf_ckpt", family=family, base=base)
        elif cfg.train.save_hf_weights:
            labels = cfg.model.labels
            export_pipeline(model, folder / "hf_ckpt", family=family, scheduler=scheduler, base=base, labels=labels)
        if drawings is not None:
            drawings.all(folder)
    if first:
        draw_loss(read_metrics(folder), folder / "loss.png")
        summary = {
            "seconds": seconds_since_launch(),
            "startup_seconds": startup,
            "training_seconds": trained_at - startup,
            "left_out_samples": lost,
            "steps": progress.step,
            "tokens": progress.tokens,
            "tokens_per_second": progress.tokens_per_second,
            "parameters": parameters,
            "trained_parameters": trained,
            "world_size": world_size(),
        }
        write_json(folder / "summary.json", summary)
        say_goodbye(folder, summary)


if __name__ == "__main__":
    main()
