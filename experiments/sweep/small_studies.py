"""Studies of three seeds that a CPU runs in minutes: what examples in context, positions and hints change."""

from experiments.sweep.study import Job, Study

SEEDS = (0, 1, 2)


def _linear_regression() -> Study:
    """Two layers of width 64 for 1200 steps of 32 in place of 12 of width 256 for 500,000 of 64; 3 dimensions in place of 20."""
    afters = (1, 2, 3, 5, 7)
    columns = {str(after): f"test:error_after_{after}" for after in afters}
    jobs = tuple(
        Job(
            mixer,
            f"linear_regression:mixer={mixer},depth=2",
            {
                "task.dims": 3,
                "task.points": 8,
                "task.measured": afters,
                "task.train": 100_000,
                "task.extrapolate": (),
                "train.steps": 1200,
                "train.batch_size": 32,
            },
            (3e-3,),
            SEEDS,
            columns,
        )
        for mixer in ("attention", "linear_attention", "gla", "deltanet")
    )
    return Study(
        "In-context linear regression in 3 dimensions",
        jobs,
        metric="loss",
        chance=1.0,
        axis="examples before",
        lower=True,
        beside={"least squares": "least_squares_after_{}", "one gradient step": "gradient_step_after_{}"},
    )


def _by_position(task: str, title: str) -> Study:
    """Two layers of attention of width 64 for 1000 steps, trained on lengths to 10."""
    lengths = (10, 12, 15, 20, 40)
    jobs = tuple(
        Job(
            position,
            f"algorithms:task={task},mixer=attention",
            {
                "task.train": 100_000,
                "task.test": 500,
                "train.steps": 1000,
                "model.mixer_defaults.position": position,
            },
            (2e-3,),
            SEEDS,
            {str(length): f"length_{length}" for length in lengths},
        )
        for position in ("none", "rope", "alibi", "fire")
    )
    return Study(title, jobs, metric="sequence_accuracy", axis="length")


def _addition() -> Study:
    """Attention of width 64 for 1500 steps of 32 on numbers of up to 3 digits, in place of 25 million parameters and 40 digits."""
    lengths = (3, 4, 5, 6)
    jobs = tuple(
        Job(
            row,
            f"algorithms:task={task},mixer=attention",
            {
                "task.train": 100_000,
                "task.test": 500,
                "task.lengths": (1, 3),
                "task.extrapolate": lengths,
                "train.steps": 1500,
                "train.batch_size": 32,
                "model.mixer_defaults.position": "fire",
            }
            | ({"task.letters": 8} if task == "addition_hints" else {}),
            (2e-3,),
            SEEDS,
            {str(length): f"length_{length}" for length in lengths},
        )
        for row, task in (("plain", "addition"), ("index hints", "addition_hints"))
    )
    return Study("Addition, trained on 1 to 3 digits", jobs, metric="sequence_accuracy", axis="digits")


STUDIES = {
    "linear_regression": _linear_regression,
    "copy_unique": lambda: _by_position("copy_unique", "Copies of distinct symbols, trained on 1 to 10"),
    "count": lambda: _by_position("count", "Counting from one number to another, trained on 1 to 10"),
    "mode": lambda: _by_position("mode", "The most frequent symbol, trained on 1 to 10"),
    "addition": _addition,
}
