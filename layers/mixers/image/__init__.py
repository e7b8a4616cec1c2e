"""Mixers that read sequences as images."""
