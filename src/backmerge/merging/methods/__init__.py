"""One file per merge method or family: pure functions of tensors."""
