"""The paper's four tasks, one file each."""
