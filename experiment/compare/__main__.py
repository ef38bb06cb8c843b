"""``python -m experiment.compare FILE``: see runner.py."""

from experiment.compare.runner import main

main()
