"""An autoencoder inside the model: splice, edit features, attribute to them."""
