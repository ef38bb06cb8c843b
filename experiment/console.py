"""The one console that everything is printed through."""

from rich.console import Console

# Text printed past a live bar would tear it, so nothing is printed past this. It writes to standard output, and draws
# no bars where that is a pipe or a file.
console = Console(highlight=False, soft_wrap=True)
