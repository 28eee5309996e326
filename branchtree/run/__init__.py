"""The run directory: its files, who holds it, and what they were made from."""
