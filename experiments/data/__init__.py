"""Data sets: generation, caching, bucketing and batching."""
