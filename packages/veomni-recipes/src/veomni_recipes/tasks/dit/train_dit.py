"""Train a diffusion transformer of diffusers on pictures or videos that `prepare_dit` has encoded, whole or by LoRA.

    torchrun --nproc-per-node 2 -m veomni_recipes.tasks.dit.train_dit run.yaml --train.lr 1e-4

Read it from top to bottom: what it calls is a function of one of the five libraries or of a small module of this
package. To change something, copy the file (it runs from anywhere) and change it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F
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

from veomni_recipes.charts import draw_loss
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
from veomni_recipes.launch import ends_with_one_sentence, note_stop, seconds_since_launch
from veomni_recipes.layout import offloading, parallel_state, wrapping
from veomni_recipes.optimization import build_optimizer, learning_rate, set_learning_rate
from veomni_recipes.progress import Display, Progress
from veomni_recipes.run_folder import Metrics, open_run_folder, read_metrics, say_goodbye, write_json
from veomni_recipes.supported import refuse_without_effect
from veomni_recipes.training_data import left_out

WITHOUT_EFFECT = (
    *("data.datasets_type", "data.columns", "data.chat_template", "data.source_name"),
    *("model.foundation", "model.encoders", "model.decoders", "model.input_encoder", "model.output_encoder"),
    *("model.encode_target", "model.moe_implementation", "model.attn_implementation"),
    *("train.vit_lr", "train.balance_ranks", "train.dyn_bsz_count_mode", "train.dyn_bsz_margin"),
    *("train.bsz_warmup_ratio", "train.expert_parallel_size", "train.ep_outside", "train.enable_full_determinism"),
    *("train.enable_profiling", "train.use_wandb"),
)


@ends_with_one_sentence(ConfigError, DataError, ModelError, ParallelError, CheckpointError)
def main(argv: list[str] | None = None) -> None:
    """Train, draw, and export."""
    cfg = parse_args(DitRecipeConfig, argv)
    refuse_without_effect(cfg, WITHOUT_EFFECT)
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

    # model: drawn by the seed, or meta -> sharded -> weights, so that no rank ever holds all of it
    on_meta = cfg.train.init_device == "meta"
    model = build_transformer(config, seed=cfg.train.seed, on_meta=on_meta)
    if not on_meta:
        load_transformer(model, base, device)
    if cfg.train.train_architecture == "lora":
        add_adapters(model, cfg.model.lora_config)
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    units = ParallelPlan(shard_units=cfg.model.basic_modules or None, no_shard=family.whole)
    model = build_parallelize_model(model, state, plan=units, **wrapping(cfg.train))
    if on_meta:
        load_transformer(model, base, device)
    if cfg.train.train_architecture == "lora":
        initialize_adapters(getattr(model, "module", model), cfg.train.seed, device)
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
    checkpoints = CheckpointManager(folder / "checkpoints", async_save=cfg.train.save_async)
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
    metrics = Metrics(folder, progress.step) if first else None
    display = Display(total_steps, progress.step, shown=first)
    display.say(f"{parameters:,} parameters, of which {trained:,} learn; {state.describe()}")
    display.say(f"{total_steps} steps of {plan.tokens_per_step:,} latent tokens, {plan.accumulation} batches a rank")
    startup = seconds_since_launch()

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
            optimizer.step()
            update_ema(optimizer, cfg.train.ema_decay)
            optimizer.zero_grad()

            line = progress.measure(
                tokens=global_sum(sum(batch["tokens"] for batch in micro_batches), state.dp),
                samples=global_sum(sum(len(batch["ids"]) for batch in micro_batches), state.dp),
                loss=global_sum(loss, state.dp).item(),
                grad_norm=grad_norm.item(),
                lr=lr,
            )
            display.step(line)
            if metrics is not None:
                metrics.write(line)
            if drawings is not None and cfg.train.sample_steps and progress.step % cfg.train.sample_steps == 0:
                drawings.sheet(folder / "samples" / f"step_{progress.step:06}.png")
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
        display.close()
        if first:
            note_stop()
        return
    lost, sentence = left_out(loader, folder)
    display.say(sentence)
    display.close()
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
