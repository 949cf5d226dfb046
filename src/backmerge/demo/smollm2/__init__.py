"""A real language model that needs no hub: SmolLM2-135M-Instruct from a pip package, and its alignment."""
