"""Random numbers of each rank: different where ranks hold different tokens, the same where they hold the same."""

from __future__ import annotations

import hashlib

import torch

from veomni_parallel.mesh import ParallelState


def seed_ranks(seed: int, state: ParallelState) -> int:
    """Seed torch's generators, of the CPU and of the devices, for what is drawn during training, such as dropout.

    Ranks of `state.loss` hold different tokens, also those that share a row, and draw differently; ranks of `state.tp`
    hold the same tokens and draw alike, as their activations must stay equal. (So dropout inside of a divided matrix's
    features is the same pattern on each part.) Weights that all ranks must draw alike are drawn before, or by a
    generator of their own.

    Returns:
        The seed of this rank, 63 bits of a hash: neighbours of neighbouring seeds do not meet.
    """
    place = f"{seed} {state.loss.get_local_rank()}".encode()
    own = int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "big") >> 1
    torch.manual_seed(own)
    return own
