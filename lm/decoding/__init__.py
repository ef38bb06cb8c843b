"""From a prompt to a story: the choice of each token, and fast steps on CPU and GPU. Imports lm.model and below."""
