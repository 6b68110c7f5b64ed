"""An omni model that reads, watches and hears is a model and a processor like any other of transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, Trainer, TrainingArguments
from veomni_data import PackingCollator, PaddingCollator
from veomni_models import OmniModel, OmniProcessor, register_omni_model

from .omni_parts import PICTURES, SOUNDS, assemble, clip, picture, sample, sound

ENCODERS = {
    "image": {"model_type": "siglip_vision_model", **PICTURES["siglip_vision_model"]},
    "video": {"share": "image"},
    "audio": {"model_type": "hubert", **SOUNDS["hubert"], "projector": {"type": "perceiver", "num_tokens": 3}},
}
CONVERSATION = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": picture(20, 30)},
            {"type": "video", "video": clip(3, 16, 16)},
            {"type": "audio", "audio": sound(9_000)},
            {"type": "text", "text": "what is this"},
        ],
    }
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[OmniModel, OmniProcessor]:
    model, processor = assemble(ENCODERS, tmp_path_factory.mktemp("tokenizer"))
    return model, processor


def prompt(processor: Any) -> Any:
    """The conversation by its chat template."""
    return processor.apply_chat_template(
        CONVERSATION,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"do_sample_frames": False, "sampling_rate": 16_000, "return_token_type_ids": False},
    )


def samples(processor: OmniProcessor) -> list[dict[str, torch.Tensor]]:
    return [
        sample(processor, "<image> is one <audio>", images=[picture(16, 24)], audio=[sound(9_000)]),
        sample(processor, "<video> two", videos=[clip(2, 24, 16, 1)], do_sample_frames=False),
        sample(processor, "<audio> is three", audio=[sound(15_000, 1)]),
        sample(processor, "what is this one"),
    ]


def test_a_chat_template_expands_each_input_to_its_tokens(parts: tuple[OmniModel, OmniProcessor]) -> None:
    inputs = prompt(parts[1])
    ids = inputs["input_ids"][0].tolist()
    names = parts[1].placeholder_ids
    # a picture is (8 / 2 / 2)^2 tokens, a video has three frames of them, a perceiver gives three
    assert [ids.count(names[f"{kind}_token_id"]) for kind in ("image", "video", "audio")] == [4, 12, 3]
    assert set(inputs) == {
        "input_ids",
        "attention_mask",
        "pixel_values",
        "pixel_values_videos",
        "input_values",
        "audio_lengths",
    }


def test_a_saved_model_gives_the_same_answer_in_a_fresh_process(
    parts: tuple[OmniModel, OmniProcessor], tmp_path: Path
) -> None:
    model, processor = parts
    inputs = prompt(processor)
    answer = model.eval().generate(**inputs, max_new_tokens=6, do_sample=False)
    model.train().save_pretrained(tmp_path / "omni")
    processor.save_pretrained(tmp_path / "omni")
    torch.save((CONVERSATION, dict(inputs), answer), tmp_path / "want.pt")
    script = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoProcessor
from veomni_models import register_omni_model
register_omni_model()
conversation, inputs, want = torch.load(sys.argv[1] + "/want.pt", weights_only=False)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/omni")
processor = AutoProcessor.from_pretrained(sys.argv[1] + "/omni")
kwargs = {"do_sample_frames": False, "sampling_rate": 16_000, "return_token_type_ids": False}
made = processor.apply_chat_template(
    conversation, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=kwargs
)
assert all(torch.equal(made[key], value) for key, value in inputs.items())
assert torch.equal(model.generate(**made, max_new_tokens=6, do_sample=False), want)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_generation_with_a_cache_is_generation_without(parts: tuple[OmniModel, OmniProcessor]) -> None:
    model, inputs = parts[0].eval(), prompt(parts[1])
    made = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    ids = inputs.pop("input_ids")
    del inputs["attention_mask"]
    for _ in range(5):
        ids = torch.cat([ids, model(input_ids=ids, **inputs, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    model.train()
    assert torch.equal(made, ids)


def test_a_batch_padded_on_the_left_answers_as_each_prompt_alone(parts: tuple[OmniModel, OmniProcessor]) -> None:
    model, processor = parts
    model.eval()
    texts, sounds = ["what is <audio>", "<audio> <audio> is one"], [sound(9_000, i) for i in range(3)]
    options = {"return_tensors": "pt", "return_token_type_ids": False}
    both = processor(text=texts, audio=sounds, padding=True, padding_side="left", **options)
    together = model.generate(**both, max_new_tokens=4, do_sample=False)[:, -4:]
    for row, (text, own) in enumerate(zip(texts, (sounds[:1], sounds[1:]), strict=True)):
        alone = model.generate(**processor(text=[text], audio=own, **options), max_new_tokens=4, do_sample=False)
        assert torch.equal(alone[0, -4:], together[row])
    model.train()


def test_gradient_checkpointing_changes_no_gradient(parts: tuple[OmniModel, OmniProcessor]) -> None:
    model, processor = parts
    row = PackingCollator()(samples(processor))
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.encoders["image"].encoder.layers[0].gradient_checkpointing
            assert model.foundation.model.layers[0].gradient_checkpointing
        model(**row, use_cache=False).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    model.gradient_checkpointing_disable()
    largest = max(g.abs().max() for g in found[0].values())
    assert found[0].keys() == found[1].keys()
    assert max((g - found[1][n]).abs().max() for n, g in found[0].items()) <= 1e-6 * largest


def test_adapters_of_peft_learn_and_are_merged(parts: tuple[OmniModel, OmniProcessor], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, processor = parts
    model.save_pretrained(tmp_path / "base")
    base = OmniModel.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["projectors.image", "projectors.audio"], bias="none"
    )
    adapted = peft.get_peft_model(base, config)
    parts_adapted = {
        name.split("base_model.model.")[1].split(".")[0] for name, p in adapted.named_parameters() if p.requires_grad
    }
    assert parts_adapted == {"foundation", "encoders", "projectors"}
    row = PaddingCollator()(samples(processor))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = adapted(**row, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(OmniModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    want = adapted.eval()(**row).logits
    torch.testing.assert_close(again.eval()(**row).logits, want, rtol=0, atol=1e-5)
    torch.testing.assert_close(again.merge_and_unload()(**row).logits, want, rtol=0, atol=1e-4)


def test_the_trainer_of_transformers_trains_it(parts: tuple[OmniModel, OmniProcessor], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, processor = parts
    model.save_pretrained(tmp_path / "base")
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=2,
        max_steps=6,
        learning_rate=5e-3,
        save_steps=6,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model=OmniModel.from_pretrained(tmp_path / "base"),
        args=arguments,
        train_dataset=samples(processor),
        data_collator=PaddingCollator(),
        processing_class=processor,
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    saved = OmniModel.from_pretrained(tmp_path / "run" / "checkpoint-6")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), trainer.model.parameters(), strict=True))
    register_omni_model()
    assert AutoProcessor.from_pretrained(tmp_path / "run" / "checkpoint-6").placeholder_ids == processor.placeholder_ids
