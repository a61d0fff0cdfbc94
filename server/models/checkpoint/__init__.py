"""Weights and settings of a checkpoint's folder."""
