"""Checkpoints that survive a kill, and Hugging Face folders in and out of sharded models."""
