"""Domain-adversarial training (arXiv 1505.07818): the deep rule, and the shallow algorithm."""
