"""Counter-current learning (arXiv 2409.19841): the rule, and what its two networks agree on."""
