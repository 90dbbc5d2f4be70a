"""Batches by position: of arrays in memory, of records on disk, of TensorFlow Datasets."""
