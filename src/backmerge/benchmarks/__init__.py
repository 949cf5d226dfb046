"""Benchmarks: prompts, and how answers to them are scored."""
