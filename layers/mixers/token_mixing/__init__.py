"""Mixing of whole sequences by fixed or generated maps."""
