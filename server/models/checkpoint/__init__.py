"""Weights and settings of a checkpoint folder."""
