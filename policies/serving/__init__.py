"""Checkpoint files of policies, and the store of those that are loaded."""
