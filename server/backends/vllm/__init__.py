"""vLLM as the place where the model runs: one pooling request a canvas and denoising step.

Only `backend` and what vLLM itself loads through our entry point import vLLM.
"""
