"""VideoAlign: motion, visual quality and text alignment of videos."""
