"""What a decomposition is worth, on held-out text, with its baselines and controls beside it."""
