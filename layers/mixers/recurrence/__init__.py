"""Elementwise recurrences."""
