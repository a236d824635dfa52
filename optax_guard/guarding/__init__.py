"""The guard and the conditions under which it skips."""
