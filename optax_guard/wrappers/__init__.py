"""Transformations that wrap an optimizer, one a file."""
