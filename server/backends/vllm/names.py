"""Names under which our parts are registered with vLLM. Imports nothing, so that any module can use them."""

CONFIG_FORMAT = "unmask"
"""Value of vLLM's `config_format` that selects our parser."""
