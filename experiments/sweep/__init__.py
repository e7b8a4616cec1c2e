"""Sweeps of many small runs: mixers, widths, learning rates and seeds on synthetic tasks (see `__main__`)."""
