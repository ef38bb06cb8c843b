"""Comparisons: rows of configurations with several seeds, run one by one and put in tables. Imports pages."""
