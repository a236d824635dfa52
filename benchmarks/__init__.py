"""Benchmarks: what the library costs beside plain Optax, and what its rules do for training.

Run them from the repository's root.
"""
