"""Feed-forward networks: gated, plain, and the forms that skip what is zero."""
