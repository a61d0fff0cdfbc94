"""Accuracy against tokens per forward: measuring samplers, reports and plots."""
