"""The digit classifier of the quickstart."""
