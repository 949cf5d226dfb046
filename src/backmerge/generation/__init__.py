"""Generators: turn prompts into completions, with any variant of a base."""
