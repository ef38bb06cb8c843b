"""Stories become batches of tokens. Imports experiment.sources.files."""
