"""What people look at: report, play page, summary and dashboard. Imports runs."""
