"""Backends: where a model runs, torch or vLLM, and the interface to the engine."""
