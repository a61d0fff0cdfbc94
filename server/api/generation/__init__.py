"""Generations of a request: from encoded prompts to the parts of the response."""
