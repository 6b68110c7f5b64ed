#!/usr/bin/env bash
# Train by a recipe on all devices of this machine:
#
#     bash train.sh tasks/train_torch.py configs/sft/qwen3_sft.yaml --model.model_path ...
#
# NPROC_PER_NODE sets how many processes start here (default: one for each GPU, NPU or XPU, else one); NNODES, NODE_RANK,
# MASTER_ADDR and MASTER_PORT say how nodes find each other.
set -euo pipefail
exec "${PYTHON:-python}" -m veomni_recipes.cli run "$@"
