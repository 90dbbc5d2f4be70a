"""Text: documents and how they are split, windows, packed rows, and a corpus every machine has."""
