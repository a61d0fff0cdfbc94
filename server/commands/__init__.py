"""Commands of `unmask`, one file a family. Each file has `register(app)`, which adds its commands."""
