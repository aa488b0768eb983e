"""The planted benchmark: attention layers whose query features, key features and pairs are known."""
