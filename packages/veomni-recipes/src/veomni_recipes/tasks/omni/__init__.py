"""Recipes of omni and vision-language models."""
