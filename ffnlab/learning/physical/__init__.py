"""Physical local learning (arXiv 2304.11042): the rule, black boxes, and learning by a twin."""
