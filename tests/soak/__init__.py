"""A server under all that clients do, for as long as one likes: what must not grow does not. `python -m tests.soak`"""
