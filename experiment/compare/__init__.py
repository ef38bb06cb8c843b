"""Runs side by side: rows of configurations with several seeds, made one by one and put in tables. Imports pages."""
