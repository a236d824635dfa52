"""Coming back after steps have gone wrong."""
