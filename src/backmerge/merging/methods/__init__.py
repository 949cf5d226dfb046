"""One file per merge method: a pure function of tensors."""
