"""Benchmarks: what the library costs beside plain Optax. Run them from the repository's root."""
