"""Training of policies, from a recipe to a checkpoint."""
