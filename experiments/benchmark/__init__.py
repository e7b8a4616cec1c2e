"""Timings of the primitives, their floors and other implementations."""
