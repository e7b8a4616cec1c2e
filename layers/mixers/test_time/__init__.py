"""Memories that a step of gradient descent, or the solution of a regression, fits to the tokens so far."""
