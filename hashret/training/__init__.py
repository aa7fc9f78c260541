"""Training: the loop that all members share, and its optimisers."""
