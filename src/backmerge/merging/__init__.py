"""Merging: methods as pure functions, recipes, and the code that carries them out on disk and in memory."""
