"""Run directories: checkpoints, logs, plots and results."""
