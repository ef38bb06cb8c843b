"""Shared by both experiments: the command line, data sources, caches, the run folder."""
