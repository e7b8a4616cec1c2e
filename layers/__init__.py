"""Layers: mixers, channel mixers, norms, positions, and under them the array primitives of `layers.kernels`."""
