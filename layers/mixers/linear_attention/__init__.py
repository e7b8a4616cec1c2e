"""Linear attention: matrix memories that add."""
