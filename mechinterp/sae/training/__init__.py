"""From settings to a folder that holds an autoencoder: the step, the loop, checkpoints, several processes."""
