"""Keeping parameters inside a set, or pulling them towards one; one constraint a file."""
