"""Normalising transformations, one rule a file."""
