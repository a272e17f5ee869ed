"""What features are about: contexts, density, logits, neighbours."""
