"""Dimensions of VBench."""
