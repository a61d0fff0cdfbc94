"""Diffusion language models, one file per architecture, and checkpoint loading."""
