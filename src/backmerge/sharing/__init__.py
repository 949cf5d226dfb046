"""Publish models to the hub and results to a tracker; never prompts, answers or records."""
