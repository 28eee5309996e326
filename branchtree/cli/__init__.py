"""The command line."""

from branchtree.cli.app import main

__all__ = ["main"]
