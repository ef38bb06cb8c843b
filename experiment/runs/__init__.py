"""A run's folder, checkpoints, records and stopping. Imports nn and sources."""
