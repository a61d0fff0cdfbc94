"""Where a model runs: the seam between the engine and torch or vLLM."""
