"""Meshes, wrappers and sequence parallelism for any PyTorch model, with the mathematics unchanged."""
