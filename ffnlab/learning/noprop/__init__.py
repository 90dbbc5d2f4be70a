"""NoProp (arXiv 2503.24322): the rule, its diffusion, its networks, its learned schedule."""
