"""Read mergekit's YAML files."""
