"""From stories to batches of tokens. Imports experiment.sources."""
