"""Samples as picture and video files."""
