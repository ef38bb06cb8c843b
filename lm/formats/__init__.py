"""Weights and tokenizers of other programs, read and written. Imports lm.model.decoder and lm.data.module."""
