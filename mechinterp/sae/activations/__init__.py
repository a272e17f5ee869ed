"""From text to batches of activations: tokens, harvest, shuffle buffer, a store on disk."""
