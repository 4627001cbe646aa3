"""Vision towers, connectors, the decoder, and the vision-language model made of them: Flax Linen, pure init and apply."""
