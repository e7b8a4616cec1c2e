"""Delta rules: matrix memories that overwrite."""
