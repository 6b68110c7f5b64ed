"""Train a vision-language model on conversations with pictures and videos: Qwen2-VL, 2.5-VL, 3-VL and their like.

    torchrun --nproc-per-node 2 -m veomni_recipes.tasks.omni.train_qwen_vl run.yaml --train.freeze_vit --train.lr 1e-5

The model and its processor are transformers' own, so any model there that reads pictures and writes text is trained by
it; one that hears too (`train_qwen_omni`) is given sounds. Read it from top to bottom: what it calls is a function of
one of the five libraries or of a small module of this package. To change something, copy the file (it runs from
anywhere) and change it.
"""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import asdict
from functools import partial
from itertools import chain
from typing import Any

import torch
from veomni_ckpt import CheckpointError, CheckpointManager, StopSignals
from veomni_config import ConfigError, VLRecipeConfig, dump_config, parse_args
from veomni_data import DataError, build_dataset, slice_for_sequence_parallel
from veomni_models import ModelError, add_adapters, build_foundation_model, plan_for, quantize_frozen, use_fused_loss
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
from veomni_recipes.charts import draw_answers, draw_loss
from veomni_recipes.data_checks import check_rows, sizes_that_differ
from veomni_recipes.determinism import make_deterministic
from veomni_recipes.distributed import barrier, gather, init_distributed, rank, to_device, world_size
from veomni_recipes.ema import ema_weights, update_ema
from veomni_recipes.errors import TrainingError
from veomni_recipes.evaluation import accuracies, answer_held_out, answer_in_training
from veomni_recipes.guard import Guard
from veomni_recipes.launch import ends_with_one_sentence, note_stop, seconds_since_launch
from veomni_recipes.layout import offloading, parallel_state, wrapping
from veomni_recipes.memory import tidied_together
from veomni_recipes.meter import Meter
from veomni_recipes.model_card import write_card
from veomni_recipes.multimodal_data import multimodal_config, multimodal_prompts, multimodal_transform, open_processor
from veomni_recipes.optimization import build_optimizer, learning_rate, set_learning_rate
from veomni_recipes.profiling import traced
from veomni_recipes.progress import Display, Progress
from veomni_recipes.run_folder import (
    VALIDATION,
    open_run_folder,
    read_metrics,
    say_goodbye,
    write_json,
    write_json_lines,
)
from veomni_recipes.supported import VISION_LANGUAGE, refuse_without_effect
from veomni_recipes.trackers import StepLog
from veomni_recipes.training_data import build_rows, describe_data, left_out
from veomni_recipes.validation import Validation
from veomni_recipes.weights import encoders_of, export, fill_foundation, freeze_encoders, learning_rates_of_encoders

Config = VLRecipeConfig


def read_data(cfg: VLRecipeConfig) -> tuple[Any, Any, Any]:
    """The processor, the training data as samples of tokens and media, and held-out questions (None without any)."""
    processor = open_processor(cfg.model)
    config = multimodal_config(cfg.model, processor)
    train_data = build_dataset(
        cfg.data.train_path,
        kind=cfg.data.datasets_type,
        transform=multimodal_transform(cfg.data, processor, config),
        seed=cfg.train.seed,
        shuffle_buffer=cfg.data.shuffle_buffer,
        root=cfg.data.root,
        name=cfg.data.source_name,
    )
    held_out = None
    if cfg.data.eval_path is not None:
        prompt = multimodal_prompts(cfg.data, processor)
        held_out = build_dataset(cfg.data.eval_path, transform=prompt, root=cfg.data.root)
    return processor, train_data, held_out


def build_model(cfg: VLRecipeConfig, processor: Any, device: torch.device) -> Any:
    """The model as transformers has it, on meta or with its weights, with adapters if these are to learn."""
    model = build_foundation_model(
        multimodal_config(cfg.model, processor),
        cfg.model.model_path,
        attn_implementation=cfg.model.attn_implementation,
        moe_implementation=cfg.model.moe_implementation,
        init_device="meta" if cfg.train.init_device == "meta" else device.type,
        seed=cfg.train.seed,
    )
    if cfg.model.quantize_frozen:
        quantize_frozen(model.requires_grad_(False), cfg.model.quantize_frozen)
    if cfg.train.train_architecture == "lora":
        add_adapters(model, cfg.model.lora_config)
    freeze_encoders(model, cfg.train)
    return model


@ends_with_one_sentence(ConfigError, DataError, ModelError, ParallelError, CheckpointError, TrainingError)
def main(argv: list[str] | None = None) -> None:
    """Train, export, and answer the held-out questions."""
    cfg = parse_args(Config, argv)
    refuse_without_effect(cfg, VISION_LANGUAGE)
    make_deterministic(cfg.train)
    device = init_distributed()

    # data: conversations -> samples -> the packed micro-batches of one optimizer step
    processor, train_data, held_out = read_data(cfg)
    if held_out is not None:
        check_rows(held_out, range(rank(), len(held_out), world_size()))
    samples = len(train_data) if isinstance(train_data, Sized) else None
    plan = cfg.batch_plan(world_size(), samples)
    steps_per_epoch = cfg.compute_train_steps(world_size(), samples)
    total_steps = steps_per_epoch * cfg.train.num_train_epochs
    state = parallel_state(cfg.train, plan, device)

    # model: meta -> sharded -> weights, so that no rank ever holds all of it; or with its weights, then sharded
    model = build_model(cfg, processor, device)
    parameters, hidden_size = sum(p.numel() for p in model.parameters()), model.config.get_text_config().hidden_size
    param_lrs, kinds = learning_rates_of_encoders(model, cfg.train), [*encoders_of(model)]
    if cfg.train.enable_fused_loss and state.tp.size() == 1:  # with tp the logits are divided already
        use_fused_loss(model)
    progress = Progress()
    meter = Meter(model, state, progress, recompute=cfg.train.enable_gradient_checkpointing)
    model = build_parallelize_model(
        model,
        state,
        plan=ParallelPlan(shard_units=[*plan_for(model)["shard_units"], *cfg.model.basic_modules] or None),
        **wrapping(cfg.train),
    )
    fill_foundation(model, cfg, device)
    optimizer = build_optimizer(
        model,
        lr=cfg.train.lr,
        weight_decay=cfg.train.weight_decay,
        no_decay_modules=cfg.train.no_decay_modules,
        no_decay_params=cfg.train.no_decay_params,
        param_lrs=param_lrs,
        optimizer=cfg.train.optimizer,
        muon=cfg.train.muon_options(),
    )

    # the run folder: a run that goes on finds its place in it
    folder, first, resume_from = cfg.train.output_dir, rank() == 0, cfg.train.load_checkpoint_path
    assets = folder / "model_assets"
    if first:
        open_run_folder(folder, resume=resume_from is not None)
        dump_config(cfg, folder / "config.yaml")
        processor.save_pretrained(assets)
    barrier()

    # rows of samples, each of which is written down in the ledger
    pad_token_id = processor.tokenizer.pad_token_id
    loader = build_rows(
        cfg,
        train_data,
        state,
        plan,
        total_steps=total_steps,
        hidden_size=hidden_size,
        pad_token_id=pad_token_id,
        folder=folder,
        description=describe_data(cfg, assets, pad_token_id),
    )
    stop, stopped = StopSignals().listen(), False
    checkpoints = CheckpointManager(
        folder / "checkpoints",
        keep_last=cfg.train.keep_last,
        async_save=cfg.train.save_async,
        trainable_only=cfg.train.train_architecture == "lora",
    )
    black_box = BlackBox(folder, loader, state, model, [processor])
    guard = Guard(cfg.train, black_box)
    validation = Validation(
        cfg,
        train_data,
        model,
        state,
        weights=partial(ema_weights, optimizer),
        pad_token_id=pad_token_id,
        answer=held_out and partial(answer_in_training, model, processor, held_out, folder / "validation"),
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

    # the end: a Hugging Face folder, and what the model in it answers
    exported, scores, question = folder / "hf_ckpt", {}, None
    if cfg.train.save_hf_weights:
        with ema_weights(optimizer):
            export(model, folder, cfg, assets=[processor])
    if held_out is not None:
        own = range(rank(), len(held_out), world_size())
        answers = sorted(chain(*gather(answer_held_out(exported, held_out, own, folder / "drawings"))))
        scores, question = accuracies(answers), answers[0].question
        if first:
            write_json_lines(folder / "predictions.jsonl", map(asdict, answers))
            draw_answers(answers, held_out, folder / "predictions.png", scores)
    if first:
        draw_loss(read_metrics(folder), folder / "loss.png", read_metrics(folder, VALIDATION))
        summary = {
            **scores,
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
        write_card(folder, cfg, "train_qwen_vl")
        say_goodbye(folder, summary, question, kinds)


if __name__ == "__main__":
    main()
