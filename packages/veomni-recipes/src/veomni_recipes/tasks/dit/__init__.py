"""Recipes of diffusion transformers."""
