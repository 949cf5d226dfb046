"""Find model weights on disk, read them tensor by tensor, compare them, and write them whole or not at all."""
