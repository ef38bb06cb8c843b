"""A run's folder, its checkpoints, what it records and how it stops. Imports nn and sources."""
