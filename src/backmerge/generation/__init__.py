"""Generators: from prompts to completions, by any variant of a base."""
