"""An autoencoder on held-out text, alone and in the model, with intervals."""
