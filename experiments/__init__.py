"""How to run: data, tasks, training, evaluation and benchmarks."""
