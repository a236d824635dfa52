"""Transformations of updates, one a file."""
