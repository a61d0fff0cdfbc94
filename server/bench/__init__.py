"""Benchmarks for users: ratios of two measurements that alternate in one run."""
