"""The entry point of ``python -m branchtree`` and ``accelerate launch -m branchtree``."""

from branchtree.cli import main

main()
