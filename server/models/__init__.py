"""Diffusion language models: one file an architecture, and the loading of checkpoints."""
