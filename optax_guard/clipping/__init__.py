"""Clipping transformations, one rule a file."""
