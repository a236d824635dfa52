"""What every transformation stands on: arrays, trees, norms, statistics, the interpreter."""
