"""Omni models that draw: losses, answers with pictures in them, and saving."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedModel
from veomni_data import Generation, PackingCollator, encode_multimodal_sample, get_chat_template
from veomni_models import (
    DrawingOptions,
    ModelError,
    OmniModel,
    OmniProcessor,
    Reply,
    build_omni_model,
    build_omni_processor,
    build_picture_decoder,
    load_decoders,
    plan_for,
    register_decoder,
    reply,
)

from tests.parallel.parity import worst

from .drawing_parts import DECODERS, DRAWN, END, SEED, START, TOKENS, build, count, pack, reference, samples
from .omni_parts import picture, save_tokenizer
from .test_initialization import PARTS

EOS, PAD = 4, 0


def answers(model: OmniModel, prompts: list[list[int]], **options: Any) -> list[Reply]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    inputs = {"input_ids": ids, "attention_mask": mask}
    options = {"unconditional_ids": torch.tensor([9, START]), "max_new_tokens": 6, "max_pictures": 2, **options}
    return reply(model, inputs, eos_token_id=EOS, pad_token_id=PAD, **options)


def draws_at_once(way: str) -> OmniModel:
    """A model whose likeliest token, wherever, is the one with which a picture begins."""
    model = build(way).eval()
    model.foundation.model.norm.weight.data.zero_()  # the logits are those of the head's bias
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]))
    head.bias.data[START] = 1.0
    return model


@pytest.mark.parametrize("way", DECODERS)
def test_a_packed_row_is_its_samples_alone(way: str) -> None:
    data, model = samples(), build(way)
    loss = model(**pack(data), num_items_in_batch=count(data), noise_seed=SEED).loss
    loss.backward()
    expected, wanted = reference(way, data)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert worst(gradients, wanted)[0] <= 1e-5


def test_the_parts_of_the_loss_add_up_to_it_and_carry_no_gradient() -> None:
    data, model = samples(), build("flow")
    out = model(**pack(data), num_items_in_batch=7, noise_seed=SEED)
    assert all(float(part) > 0 for part in out.losses.values())
    assert {name: part.requires_grad for name, part in out.losses.items()} == {"text": False, "pictures": False}
    assert float(sum(out.losses.values())) == pytest.approx(out.loss.item(), rel=1e-6)


@pytest.mark.parametrize("way", DECODERS)
def test_without_the_number_of_targets_the_loss_is_the_mean_over_them(way: str) -> None:
    data, model = samples(), build(way)
    mean = model(**pack(data), noise_seed=SEED).loss
    assert mean.item() == pytest.approx(reference(way, data)[0], rel=1e-6)


def test_codes_are_learnt_like_words() -> None:
    """The loss is the cross-entropy of the tokenizer's codes, worked out by hand from the logits."""
    data, model = samples()[4:5], build("codes").eval()
    codes = model.decoders["image"].codes(data[0]["target_pixel_values"]) + model.config.first_code_id
    ids = data[0]["input_ids"].clone()
    ids[ids == DRAWN] = codes.flatten()
    labels = data[0]["labels"].clone()
    labels[labels == DRAWN] = codes.flatten()
    logits = model(input_ids=ids[None], pixel_values=data[0]["pixel_values"]).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum") / 7
    assert model(**pack(data), num_items_in_batch=7).loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_noise_of_a_picture_is_its_own() -> None:
    decoder = build("flow").decoders["image"]
    condition, pictures = torch.randn(3, TOKENS, 32), torch.rand(3, 3, 8, 8)
    losses = decoder.loss(condition, pictures, seed=1)
    assert torch.allclose(losses[1:2], decoder.loss(condition[1:2], pictures[1:2], seed=1), rtol=1e-6)
    assert not torch.allclose(losses, decoder.loss(condition, pictures, seed=2), rtol=1e-3)


def test_a_flow_learns_the_pictures_of_its_conditions() -> None:
    torch.manual_seed(0)
    keys = {**DECODERS["flow"], "hidden_size": 32, "noise_samples": 32, "condition_size": 8, "num_channels": 1}
    decoder = build_picture_decoder(keys)
    condition = torch.randn(2, TOKENS, 8)
    pictures = (torch.rand(2, 1, 8, 8) > 0.5).float().expand(-1, 3, -1, -1) * 2 - 1
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=5e-3)
    for _ in range(200):
        decoder.loss(condition, pictures).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    drawn = decoder.sample(condition, num_steps=10)
    error = (drawn - pictures).square().mean((1, 2, 3))
    assert error.max() < 0.15  # another one's is about 2
    guided = decoder.sample(condition[:1], condition[1:], guidance_scale=0.0, num_steps=10)
    assert (guided - pictures[1:]).square().mean() < 0.15, "guidance 0 is the picture without the wish"


def test_a_tokenizer_learns_and_finds_its_codes_again() -> None:
    torch.manual_seed(0)
    tokenizer = build_picture_decoder(DECODERS["codes"]).train()
    tokenizer.tidy_codebook()
    pictures = (torch.rand(8, 1, 1, 1).expand(-1, 3, 8, 8) * 2 - 1).contiguous()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=2e-3)
    errors = []
    for step in range(200):
        out = tokenizer(pictures)
        error = (out.decoded_pixel_values - pictures).square().mean()
        (error + out.embedding_loss).backward()
        assert tokenizer.encoder.conv_in.weight.grad.abs().max() > 0
        optimizer.step()
        optimizer.zero_grad()
        unused = torch.bincount(out.codes.flatten(), minlength=tokenizer.num_codes) == 0
        tokenizer.tidy_codebook(unused if step % 10 == 9 and step < 150 else None, pictures)
        errors.append(error.item())
    assert errors[-1] < 0.3 * errors[0]
    assert torch.allclose(tokenizer.quantize.embedding.weight.norm(dim=-1), torch.ones(tokenizer.num_codes))
    assert torch.equal(tokenizer(pictures).codes, tokenizer.codes(pictures))


@pytest.mark.parametrize("way", DECODERS)
def test_answers_draw_where_a_picture_begins(way: str) -> None:
    model = draws_at_once(way)
    first, second = answers(model, [[7, 8], [9, 10, 11, 12]])
    assert [type(part) for part in first.parts] == [list, torch.Tensor, list, torch.Tensor, list]
    assert first.token_ids == []
    assert all(p.shape == (3, 8, 8) and p.abs().max() <= 1 for p in first.pictures + second.pictures)
    again = answers(model, [[7, 8], [9, 10, 11, 12]], drawing=DrawingOptions(seed=0))
    assert torch.equal(first.pictures[1], again[0].pictures[1])
    other = answers(model, [[7, 8], [9, 10, 11, 12]], drawing=DrawingOptions(seed=1))
    assert not torch.equal(first.pictures[0], other[0].pictures[0])


@pytest.mark.parametrize("way", DECODERS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_padding_and_neighbours_do_not_change_a_drawing(way: str, guidance: float) -> None:
    model = build(way).eval()
    drawing = DrawingOptions(guidance_scale=guidance, temperature=0.0, num_steps=3)
    prompts = [[7, 8, START], [9, 10, 11, 12, 13, START]]
    from veomni_models.drawing import draw

    contexts = [model.embed(torch.tensor([prompt]))[0].detach() for prompt in prompts]
    nothing = model.embed(torch.tensor([[9, START]]))[0].detach()
    together, _ = draw(model, contexts, nothing, drawing, torch.Generator().manual_seed(0))
    alone, _ = draw(model, contexts[:1], nothing, drawing, torch.Generator().manual_seed(0))
    assert torch.allclose(together[:1], alone, atol=1e-5)
    if way == "flow":
        other, _ = draw(model, contexts[1:], nothing, drawing, torch.Generator().manual_seed(0))
        assert not torch.allclose(other, alone, atol=1e-3), "the prompt has no influence"


def test_guided_codes_are_those_of_the_formula() -> None:
    """One code after the other from two plain forwards without a cache, by u + s (c - u)."""
    from veomni_models.drawing import draw

    model, wish, nothing, codes = build("codes").eval(), [7, 8, 12, START], [9, START], []
    first, last = model.config.first_code_id, model.config.first_code_id + 8
    for _ in range(TOKENS):
        c, u = (model(input_ids=torch.tensor([ids + codes])).logits[0, -1, first:last] for ids in (wish, nothing))
        codes.append(int((u + 2.5 * (c - u)).argmax()) + first)
    contexts = [model.embed(torch.tensor([ids]))[0].detach() for ids in (wish, nothing)]
    options = DrawingOptions(guidance_scale=2.5, temperature=0.0)
    pictures, _ = draw(model, contexts[:1], contexts[1], options, torch.Generator())
    expected = model.decoders["image"].pictures(torch.tensor([codes]) - first)
    assert torch.equal(pictures, expected)


FRESH = """
import sys, torch
sys.path[:0] = sys.argv[3:]
from veomni_models import OmniModel
from tests.models.test_drawing import answers
made = answers(OmniModel.from_pretrained(sys.argv[1]).eval(), [[7, 8], [9, 10, 11, 12]])
torch.save([[reply.token_ids, *reply.pictures] for reply in made], sys.argv[2])
"""


@pytest.mark.parametrize("way", DECODERS)
def test_a_saved_model_gives_the_same_answers_in_a_fresh_process(way: str, tmp_path: Path) -> None:
    model = build(way).eval()
    model.get_output_embeddings().weight.data[START] *= 20
    made = answers(model, [[7, 8], [9, 10, 11, 12]])
    assert any(each.pictures for each in made)
    model.save_pretrained(tmp_path / "model")
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", FRESH, str(tmp_path / "model"), str(tmp_path / "made.pt"), root, f"{root}/tests"]
    subprocess.run(command, check=True, cwd=tmp_path)
    for ours, (said, *pictures) in zip(made, torch.load(tmp_path / "made.pt"), strict=True):
        assert ours.token_ids == said
        assert len(ours.pictures) == len(pictures)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours.pictures, pictures, strict=True))


@pytest.mark.parametrize("way", DECODERS)
def test_a_decoder_comes_with_its_weights(way: str, tmp_path: Path) -> None:
    decoder = build_picture_decoder({**DECODERS[way], **({"condition_size": 32} if way == "flow" else {})}, seed=3)
    decoder.save_pretrained(tmp_path)
    options: dict[str, Any] = {**PARTS, "image_gen_token_id": DRAWN, "image_gen_start_token_id": START}
    options |= {"decoders": {"image": {"model_path": tmp_path}}, "image_gen_end_token_id": END}
    model = build_omni_model(**options, init_device="cpu")
    for name, value in decoder.state_dict().items():
        assert torch.equal(model.decoders["image"].state_dict()[name], value), name
    meta = build_omni_model(**options, init_device="meta").to_empty(device="cpu")
    load_decoders(meta, options["decoders"])
    assert torch.equal(meta.decoders["image"].state_dict()[name], value)
    assert all(p.requires_grad == (way == "flow") for p in model.decoders.parameters())


def test_blocks_of_a_decoder_are_units_of_sharding() -> None:
    assert "FlowBlock" in plan_for(build("flow"))["shard_units"]
    assert "JanusVQVAEResnetBlock" in plan_for(build("codes"))["shard_units"]


@pytest.mark.parametrize("way", DECODERS)
def test_conversations_with_drawings_train_it(way: str, tmp_path: Path) -> None:
    encoders = {"image": PARTS["encoders"]["image"]}
    processor = build_omni_processor(save_tokenizer(tmp_path), encoders=encoders, decoders={"image": DECODERS[way]})
    processor.save_pretrained(tmp_path / "saved")
    processor = OmniProcessor.from_pretrained(tmp_path / "saved")
    template = get_chat_template("default", processor.tokenizer)
    generation = Generation(**processor.generation)
    conversation = {
        "messages": [
            {"role": "user", "content": "<image>what is this"},
            {"role": "assistant", "content": "one <image>"},
        ],
        "images": [picture(8, 8), picture(9, 12, seed=1)],
    }
    sample = encode_multimodal_sample(conversation, processor=processor, template=template, generation=generation)
    drawn = processor.placeholder_ids["image_gen_token_id"]
    assert (sample["labels"] == drawn).sum() == TOKENS
    assert sample["target_pixel_values"].shape == (1, 3, 8, 8)
    assert -1 <= sample["target_pixel_values"].min() < sample["target_pixel_values"].max() <= 1
    model = build_omni_model(
        foundation=PARTS["foundation"],
        encoders=encoders,
        decoders={"image": DECODERS[way]},
        vocab_size=len(processor.tokenizer),
        **processor.placeholder_ids,
        init_device="cpu",
    )
    loss = model(**PackingCollator()([sample, sample])).loss
    assert loss.item() > 0


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    model, row = build("flow"), pack(samples())
    with pytest.raises(ValueError, match=r"16 tokens of pictures to draw in input_ids for 3 pictures .* have 12"):
        model(**{**row, "target_pixel_values": row["target_pixel_values"][:3]})
    short = row["input_ids"].clone()
    short[0, (short[0] == DRAWN).nonzero()[0]] = 7
    with pytest.raises(ValueError, match="15 tokens of pictures to draw in input_ids, which are 4 for each"):
        model(**{**row, "input_ids": short})
    with pytest.raises(ModelError, match="guidance_scale other than 1 needs the ids of a prompt without a wish"):
        answers(draws_at_once("flow"), [[7, 8]], unconditional_ids=None)
    with pytest.raises(ModelError, match=r"model.decoders.image: image_size=8 must be a multiple of patch_size=3"):
        build_omni_processor(save_tokenizer(tmp_path), decoders={"image": {**DECODERS["flow"], "patch_size": 3}})
    with pytest.raises(ModelError, match=r"model.decoders.image: no decoder is of model_type 'llama': use one of"):
        build_picture_decoder({"model_type": "llama"})
    with pytest.raises(ModelError, match="decoders are built for image"):
        build_omni_model(**PARTS, decoders={"audio": DECODERS["flow"]})


class ShadesConfig(PreTrainedConfig):
    model_type = "shades"
    image_size: int = 8
    num_tokens: int = 1


class Shades(PreTrainedModel):
    """Each picture is the nearest of three even greys."""

    config_class = ShadesConfig
    num_codes = 3

    def codes(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return (pixel_values.mean((1, 2, 3)) + 1).round().long()[:, None]

    def pictures(self, codes: torch.Tensor) -> torch.Tensor:
        return (codes - 1.0)[:, :, None, None].expand(-1, 3, 8, 8)


def test_a_decoder_of_ones_own_is_a_class_and_a_call() -> None:
    register_decoder("shades", Shades)
    model = build_omni_model(
        **PARTS,
        decoders={"image": {"model_type": "shades"}},
        image_gen_token_id=DRAWN,
        image_gen_start_token_id=START,
        image_gen_end_token_id=END,
        init_device="cpu",
    )
    ids = torch.tensor([[7, START, DRAWN, END]])
    white = torch.ones(1, 3, 8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        model(input_ids=ids, labels=ids, target_pixel_values=white).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    (answer,) = answers(model.eval(), [[7]], drawing=DrawingOptions(guidance_scale=1.0, temperature=0.0))
    assert torch.equal(answer.pictures[0], white[0])
    with pytest.raises(ModelError, match=r"shades.*already"):
        register_decoder("shades", type("Other", (Shades,), {}))


def test_pixels_become_pictures_and_back() -> None:
    from veomni_recipes.evaluation import _image

    shade = Image.new("RGB", (8, 8), (255, 128, 0))
    pixels = torch.tensor([1.0, 128 / 127.5 - 1, -1.0])[:, None, None].expand(3, 8, 8)
    assert _image(pixels).tobytes() == shade.tobytes()
