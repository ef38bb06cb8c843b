"""A prompt becomes a story: the choice of each token, and fast steps on CPU and GPU. Imports lm.model.decoder."""
