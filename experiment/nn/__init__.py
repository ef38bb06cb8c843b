"""Network parts that both experiments use. Imports torch only."""
