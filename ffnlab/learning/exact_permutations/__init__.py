"""Exact learning of permutations (arXiv 2502.16763): closed forms, and ensembles."""
