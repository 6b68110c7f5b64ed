"""Readable, trainer-free training scripts and their configs, and the `veomni` command."""

import logging

# transformers imports torchao where it is installed, of which torch then says two lines on every rank
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
# on CPUs ranks exchange shards by gathering them, which it says on every rank
logging.getLogger("torch.distributed.tensor._collective_utils").setLevel(logging.ERROR)
