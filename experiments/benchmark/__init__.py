"""Timings of the primitives beside their floors and beside other implementations."""
