"""The ground floor both experiments stand on: the command line, sources of text, caches, the run's folder."""
