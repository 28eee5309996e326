"""How long a test waits before it says that something hangs: far longer than anything takes on the busiest machine."""

PATIENCE = 900.0
"""Seconds. No test passes or fails by how fast the machine is; this only ends what would never end."""
