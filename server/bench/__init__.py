"""Measurements that users repeat: ratios of two things that alternate in one run."""
