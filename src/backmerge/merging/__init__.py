"""Merging: methods as pure functions, recipes, and what carries them out on disk and in memory."""
