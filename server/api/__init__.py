"""HTTP API: OpenAI's routes and our own. All computation is left to the engine."""
