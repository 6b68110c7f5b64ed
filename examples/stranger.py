"""A language model of one's own, trained on any number of ranks by the lines marked with a number.

    python examples/stranger.py                                                          # one process
    torchrun --nproc-per-node 4 examples/stranger.py --ulysses 2 --experts 2            # four

The model is plain PyTorch with attention and a mixture of experts written by hand, and reads this file letter by
letter. `--check` compares the first step's loss and every gradient with those of one process.
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from veomni_parallel import (
    ParallelPlan,
    build_parallelize_model,
    clip_grad_norm_,
    global_sum,
    init_parallel_state,
    loss_scale,
    ulysses_attention,
)

LETTERS, LENGTH, WIDTH, HEADS, EXPERTS, CHOSEN = 128, 64, 32, 4, 4, 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.group = None  # the ranks that share a row

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, S, D]
        out = ulysses_attention(q, k, v, self.group, causal)  # 1: was causal(q, k, v)
        return self.out(out.transpose(1, 2).flatten(2))


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Experts(nn.Module):
    """Two-layer networks side by side: weights have the experts in their first dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * WIDTH) * WIDTH**-0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, WIDTH) * (2 * WIDTH) ** -0.5)

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [T, H], the chosen experts' index [T, K] and weights [T, K] -> [T, H]."""
        out = torch.zeros_like(x)
        for expert in range(len(self.up)):
            token, slot = torch.where(index == expert)
            y = F.gelu(x[token] @ self.up[expert]) @ self.down[expert]
            out = out.index_add(0, token, y * weights[token, slot, None])
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.norm2, self.router, self.experts = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, EXPERTS), Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        tokens = self.norm2(x).flatten(0, 1)
        weights, index = self.router(tokens).softmax(-1).topk(CHOSEN, dim=-1)
        return x + self.experts(tokens, index, weights).view_as(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(LETTERS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, LETTERS)

    def forward(self, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        x = self.letters(ids) + self.places(places)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def batches(rows: int):
    """Endless [rows, LENGTH + 1] of the text's letters, the same on all ranks."""
    with open(__file__, encoding="ascii") as file:
        text = torch.tensor(list(file.read().encode()))
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(text) - LENGTH, (rows, 1), generator=generator)
        yield text[starts + torch.arange(LENGTH + 1)]


def whole_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ulysses", type=int, default=1, help="ranks that share each row")
    parser.add_argument("--experts", type=int, default=1, help="ranks that the experts are dealt over")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--check", action="store_true", help="compare the first step with one process")
    args = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group()
    torch.manual_seed(0)
    model, plain = Model(), Model()
    plain.load_state_dict(model.state_dict())

    state = init_parallel_state(ulysses=args.ulysses, ep=args.experts)  # 2: who is with whom
    for block in model.blocks:
        block.attention.group = state.sp.get_group()
    model = build_parallelize_model(model, state, plan=ParallelPlan(experts=["blocks.*.experts"]))  # 3: over the ranks
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    for step, batch in zip(range(args.steps), batches(rows=8), strict=False):
        row = batch[state.dp.get_local_rank() :: state.dp.size()].to(state.device)
        own = torch.arange(LENGTH, device=state.device).chunk(state.sp.size())[state.sp.get_local_rank()]
        logits = model(row[:, own], own)
        loss = F.cross_entropy(logits.flatten(0, 1), row[:, own + 1].flatten(), reduction="sum") / (8 * LENGTH)
        (loss * loss_scale(state)).backward()  # 4: undoes the wrapper's mean
        total = global_sum(loss.detach(), state.loss).item()
        if args.check and step == 0:
            check(plain, batch, total, whole_gradients(model), state.rank)
        clip_grad_norm_(model, 1.0, state)  # 5: exact, equal on all ranks
        optimizer.step()
        optimizer.zero_grad()
        if state.rank == 0 and (step % 20 == 0 or step == args.steps - 1):
            print(f"step {step:3d}  loss {total:.4f}", flush=True)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def check(plain: nn.Module, batch: torch.Tensor, loss: float, gradients: dict[str, torch.Tensor], rank: int) -> None:
    """One process runs each row alone through the plain model."""
    expected = 0.0
    for row in batch.split(1):
        logits = plain(row[:, :-1], torch.arange(LENGTH))
        one = F.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten(), reduction="sum") / (8 * LENGTH)
        one.backward()
        expected += one.item()
    off = {
        name: ((gradients[name].cpu() - p.grad).abs().max() / p.grad.abs().max()).item()
        for name, p in plain.named_parameters()
    }
    worst = max(off, key=off.__getitem__)
    if abs(loss / expected - 1) > 1e-5 or off[worst] > 1e-5:
        raise SystemExit(f"loss {loss} of {expected}, gradient of {worst} off by {off[worst]:.1e}")
    if rank == 0:
        print(f"as one process: loss {loss:.6f}, worst of {len(off)} gradients off by {off[worst]:.1e} ({worst})")


if __name__ == "__main__":
    main()
