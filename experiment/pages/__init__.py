"""Output for people: report, play page, summary and dashboards. Imports runs."""
