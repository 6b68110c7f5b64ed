"""Samples to tokens to packed micro-batches, exactly once on any number of machines."""
