"""Replays what the original implementations did, recorded as fixtures, with our own model, loop and samplers."""
