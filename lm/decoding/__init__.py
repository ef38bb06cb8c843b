"""Text generation: sampling, and fast decoding steps on CPU and GPU. Imports lm.model and below."""
