"""Speed and memory, as ratios against a peer or the machine's floor; tests never assert a time."""
