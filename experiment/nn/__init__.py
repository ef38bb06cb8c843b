"""Pieces of networks that both experiments use. Imports torch only."""
