"""Weights and tokenizers of other programs, read and written. Imports lm.model and lm.data."""
