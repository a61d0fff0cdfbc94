"""Names under which our parts are registered with vLLM. Imports nothing, so that all sides can read them."""

CONFIG_FORMAT = "unmask"
"""How vLLM is told to read a `config.json`: with our parser."""
