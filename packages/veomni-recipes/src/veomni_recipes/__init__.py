"""Readable, trainer-free training scripts and their configs, and the `veomni` command."""
