"""Forward learning of graph networks (arXiv 2403.11004): its batches, objectives and rule."""
