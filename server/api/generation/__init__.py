"""A request's generations: from encoded prompts to the pieces of its answer."""
