"""The decoder in plain torch: its shape, layers, key-value cache and loss. Imports experiment.nn only."""
