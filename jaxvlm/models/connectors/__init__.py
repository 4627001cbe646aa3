"""Connectors: from a vision tower's features to the language model's embeddings."""
