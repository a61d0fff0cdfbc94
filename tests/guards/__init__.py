"""Guards, and the tests that fail without each: `python -m tests.guards` takes every one of them out, in turn."""
