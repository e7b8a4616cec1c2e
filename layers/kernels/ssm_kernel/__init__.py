"""Convolution kernels of linear state space models."""
