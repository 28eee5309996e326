"""Motion of videos, measured without a network."""
