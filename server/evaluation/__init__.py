"""Keeping, showing and publishing what `policies.evaluate` measures."""
