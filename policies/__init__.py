"""Learned unmasking policies, the tasks they are trained and judged on, and their evaluation."""
