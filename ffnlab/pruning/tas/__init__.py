"""Transformable architecture search (arXiv 1905.09717): see `ffnlab.pruning.tas.rule`."""
