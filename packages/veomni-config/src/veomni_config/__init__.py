"""Typed YAML and command-line configuration, where no mistake costs a run."""
