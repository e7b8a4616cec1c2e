"""The studies: configs of synthetic tasks with changed fields, learning rates and seeds.

With these sizes one GPU runs a study in minutes; each study states the differences from the papers.
"""

from experiments.sweep import paper_studies, small_studies
from experiments.sweep.study import Job, Study


def _copying() -> Study:
    """Length 256 and 4000 steps at a tuned rate in place of 4096 and 400,000 at 1e-4."""
    mixers = ("s4d", "s4", "s5", "h3", "hyena", "mamba", "mamba2", "gated_deltanet", "attention")
    changes = {
        "task.length": 256,
        "task.tokens": 16,
        "train.steps": 4000,
        "model.mixers": {},
    }
    jobs = tuple(
        Job(mixer, f"selective_copying:mixer={mixer}", changes, (1e-3, 4e-3), (0,), {"accuracy": "test"})
        for mixer in mixers
    )
    return Study("Selective copying: 16 tokens among 256 of noise", jobs, chance=1 / 14)


def _induction() -> Study:
    """Batches of 64 for 6000 steps in place of 8 for 204,800; evaluated to 2^14."""
    mixers = ("s4d", "s4", "hyena", "h3", "attention", "rwkv4", "mamba", "mamba2")
    lengths = tuple(2**n for n in range(6, 15))
    changes = {
        "task.length": 256,
        "task.test": 64,
        "train.batch_size": 64,
        "train.steps": 6000,
        "optimizer.final_learning_rate": 0.0,
    }
    columns = {str(length): f"length_{length}" for length in lengths}
    jobs = tuple(
        Job(mixer, f"induction_heads:mixer={mixer}", changes, (1e-3, 3e-3), (0,), columns) for mixer in mixers
    )
    return Study("Induction heads: trained on 256 tokens", jobs, chance=1 / 16, axis="length")


def _mqar() -> Study:
    """32 pairs in 256 tokens, vocabulary 1024 and 3000 steps of 64; the paper's largest is 64 in 512 of 8192, 50,000."""
    changes = {
        "task.vocab_size": 1024,
        "task.length": 256,
        "task.pairs": 32,
        "task.train": 100_000,
        "train.steps": 3000,
        "optimizer.warmup_steps": 200,
    }
    # Mamba-2's own sizes are for wider models.
    sizes = {"mamba2": {"mamba2": {"head_dim": 16, "state_size": 64}}}
    jobs = tuple(
        Job(
            mixer,
            f"mqar:mixer={mixer},width={width}",
            changes | {"model.mixers": sizes.get(mixer, {})},
            (1e-3, 3e-3, 1e-2),
            (0,),
            {str(width): "test"},
        )
        for mixer in ("attention", "deltanet", "gated_deltanet", "mamba2", "hyena", "rwkv4")
        for width in (32, 64, 128)
    )
    return Study("Multi-query associative recall: 32 pairs in 256 tokens", jobs, chance=1 / 512, axis="width")


MAD = (
    "in_context_recall",
    "noisy_recall",
    "fuzzy_recall",
    "selective_copying",
    "compression",
    "memorization",
)


def _mad() -> Study:
    """The tasks' base settings for 20 epochs; the paper averages over harder ones too, and trains for 200."""
    mixers = (
        "attention",
        "mamba",
        "mamba2",
        "gla",
        "deltanet",
        "gated_deltanet",
        "retnet",
        "hyena",
        "rwkv4",
        "s4d",
    )
    jobs = tuple(
        Job(
            mixer,
            f"mad:task={task},mixer={mixer}",
            {"train.steps": 2000},
            (5e-4, 2e-3),
            (0,),
            {task: "test"},
        )
        for mixer in mixers
        for task in MAD
    )
    return Study("MAD, base settings", jobs, average=True)


def _parity() -> Study:
    """Lengths 3 to 40 as in Grazzi et al. 2025, for 6000 steps of 128; every bit is labelled."""
    lengths = (40, 64, 128, 256)
    variants = {
        "deltanet, eigenvalues in [0, 1]": ("deltanet", False),
        "deltanet, eigenvalues in [-1, 1]": ("deltanet", True),
        "gated_deltanet, eigenvalues in [0, 1]": ("gated_deltanet", False),
        "gated_deltanet, eigenvalues in [-1, 1]": ("gated_deltanet", True),
        **{name: (name, True) for name in ("mamba", "mamba2", "s4d", "rwkv7", "lstm", "attention")},
    }
    columns = {str(length): f"length_{length}" for length in lengths}
    jobs = tuple(
        Job(
            row,
            f"algorithms:task=running_parity,scale=paper,mixer={mixer}",
            {
                "task.extrapolate": lengths,
                "train.steps": 6000,
                "train.batch_size": 128,
                "model.mixer_defaults.negative_eigenvalues": negative,
            },
            (1e-3, 4e-3),
            (0, 1, 2),
            columns,
        )
        for row, (mixer, negative) in variants.items()
    )
    return Study("Parity of every prefix: trained on 3 to 40 bits", jobs, chance=0.5, axis="length")


def _width_transfer() -> Study:
    """Mamba-2 and attention, at the rates of a model of width 64 by muP, and without; 200 steps, small enough for a CPU."""
    jobs = tuple(
        Job(
            row,
            f"mqar:width={width}",
            {
                "task.vocab_size": 32,
                "task.length": 16,
                "task.pairs": 4,
                "task.train": 20_000,
                "train.batch_size": 32,
                "train.steps": 200,
                "optimizer.warmup_steps": 20,
                "model.pattern": ("mamba2", "attention"),
                "model.mixers": {"mamba2": {"head_dim": 16, "state_size": 16}},
                "model.mixer_defaults": {"heads": width // 16},
                "model.base_width": base,
            },
            (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
            (0,),
            {str(width): "test"},
        )
        for width in (64, 128, 256)
        for row, base in (("muP", 64), ("standard", None))
    )
    return Study("Transfer of learning rates: 4 pairs in 16 tokens", jobs, chance=1 / 16, axis="width")


STUDIES = {
    "copying": _copying,
    "induction": _induction,
    "mqar": _mqar,
    "mad": _mad,
    "parity": _parity,
    "width_transfer": _width_transfer,
    "state_tracking": paper_studies.state_tracking,
    "recall_state": paper_studies.recall_state,
    "mqar_paper": paper_studies.mqar,
    "mad_harder": paper_studies.mad,
    **small_studies.STUDIES,
}
