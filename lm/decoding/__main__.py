"""``python -m lm.decoding RUN``: see strategies.py."""

from lm.decoding.strategies import main

main()
