"""Our models in EleutherAI's lm-evaluation-harness, with the conventions of its own HFLM."""
