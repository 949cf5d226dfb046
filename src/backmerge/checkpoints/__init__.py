"""Model weights on disk: found, read one tensor at a time, compared, and written whole or not at all."""
