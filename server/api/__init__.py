"""The HTTP face: OpenAI's routes and ours. It computes nothing; the engine does."""
