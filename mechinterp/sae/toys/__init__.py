"""Ground truth: a known dictionary, and toy models of superposition."""
