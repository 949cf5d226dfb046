"""mergekit's YAML, for those who have some."""
