"""Training: experiment, step, state, loop and evaluation."""
