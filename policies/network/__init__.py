"""The unmasking network and its features."""
