"""Studies that take longer: at the sizes of papers, over their harder settings, and of what a state can hold and track."""

from experiments.sweep.study import Job, Study

SEEDS = (0, 1, 2)


def state_tracking() -> Study:
    """Words of 3 to 40 elements for 6000 steps of 128; Siems et al. 2025 (arXiv:2502.10297) train on words of 128."""
    lengths = (40, 64, 128, 256)
    mixers = {
        "deltanet, eigenvalues in [0, 1]": ("deltanet", {"negative_eigenvalues": False}),
        "deltanet, eigenvalues in [-1, 1]": ("deltanet", {}),
        "gated_deltanet, eigenvalues in [-1, 1]": ("gated_deltanet", {}),
        **{
            f"gated_deltaproduct, {count} steps per token": ("gated_deltaproduct", {"householders": count})
            for count in (2, 3, 4)
        },
        "rwkv7": ("rwkv7", {"head_dim": 16}),
        **{name: (name, {"head_dim": 16, "state_size": 16}) for name in ("mamba2", "mamba3")},
        **{name: (name, {}) for name in ("mamba", "slstm", "lstm", "attention", "path_attention")},
    }
    groups = {"Z60": "", "S3": "", "S5, swaps": "2", "S5": ""}
    jobs = tuple(
        Job(
            f"{group}: {row}",
            f"state_tracking:group={group.partition(',')[0]},moved={moved},mixer={mixer}",
            {
                "task.lengths": (3, 40),
                "task.extrapolate": lengths,
                "train.steps": 6000,
                "model.mixers": {mixer: options},
            },
            (1e-3, 4e-3),
            SEEDS,
            {str(length): f"length_{length}" for length in lengths},
        )
        for group, moved in groups.items()
        for row, (mixer, options) in mixers.items()
    )
    return Study("Products of elements of groups: trained on words of 3 to 40", jobs, axis="length")


def recall_state() -> Study:
    """32 pairs in 256 tokens at width 128, against the features of the state per channel; values have as many as keys.

    Based has 1 + f + f^2 features, the nearest; the channels of mLSTM, Mamba, Mamba-2 and Mamba-3 are twice the width. The state of SSE
    has five parts of that size, and ATLAS has the products of two features of a key as further ones.
    """
    changes = {
        "task.vocab_size": 1024,
        "task.length": 256,
        "task.pairs": 32,
        "task.train": 100_000,
        "train.steps": 3000,
        "optimizer.warmup_steps": 200,
    }
    by_size = {
        **{
            name: lambda n: {"heads": 128 // n}
            for name in ("deltanet", "gated_deltanet", "kda", "mesa_net", "ttt_linear")
        },
        **{name: lambda n: {"heads": 128 // n, "head_dim": n} for name in ("titans", "atlas")},
        **{
            name: lambda n: {"heads": 128 // n, "key_dim": n, "value_dim": n}
            for name in ("gla", "retnet", "sse")
        },
        "hgrn2": lambda n: {"heads": 128 // n, "key_dim": n},
        "mlstm": lambda n: {"heads": 256 // n},
        "based": lambda n: {"heads": 8, "feature_dim": {8: 2, 16: 3, 32: 5, 64: 7}[n]},
        "rwkv7": lambda n: {"head_dim": n},
        **{name: lambda n: {"head_dim": 32, "state_size": n} for name in ("mamba2", "mamba3")},
        "mamba": lambda n: {"state_size": n},
    }
    jobs = tuple(
        Job(
            mixer,
            f"mqar:mixer={mixer},width=128",
            changes | {"model.mixers": {mixer: options(features)}},
            (1e-3, 3e-3, 1e-2),
            SEEDS,
            {str(features): "test"},
        )
        for mixer, options in by_size.items()
        for features in (8, 16, 32, 64)
    )
    title = "Multi-query associative recall: 32 pairs in 256 tokens"
    return Study(title, jobs, chance=1 / 512, axis="features of the state per channel")


def mqar() -> Study:
    """Figure 2 of Arora et al. 2024 (arXiv:2312.04927) at its longest: 64 pairs in 512 tokens of 8192; 8 epochs in place of 64."""
    mixers = (
        *("attention", "deltanet", "gated_deltanet", "kda", "rwkv7", "mamba", "mamba2", "mamba3", "gla"),
        *("retnet", "hgrn2", "based", "mlstm", "sse", "hyena", "h3", "rwkv4"),
    )
    sizes = {name: {"head_dim": 32, "state_size": 64} for name in ("mamba2", "mamba3")}
    # The state of one head of the whole width is larger than that of any published model.
    sizes |= {"based": {"heads": 4}}
    jobs = tuple(
        Job(
            mixer,
            f"mqar:scale=paper,length=512,mixer={mixer},width={width}",
            {
                "task.train": 100_000,
                "train.steps": 6250,
                "optimizer.warmup_steps": 0,
                "model.mixers": {mixer: sizes.get(mixer, {})},
            },
            (1e-4, 4.6e-4, 2.2e-3, 1e-2),
            SEEDS,
            {str(width): "test"},
        )
        for mixer in mixers
        for width in (64, 128, 256)
    )
    title = "Multi-query associative recall: 64 pairs in 512 tokens of 8192"
    return Study(title, jobs, chance=1 / 4096, axis="width")


SIZES = {
    "task.vocab_size": (32, 64, 128),
    "task.length": (256, 512, 1024),
    "task.train": (6400, 3200, 1600, 800),
}
# Changes of one field of the base settings each, as in the authors' code (athms/mad-lab, configs/tasks).
HARDER = {
    "in_context_recall": SIZES,
    # With 16 tokens of noise.
    "noisy_recall": SIZES | {"task.vocab_size": (48, 80, 144), "task.noise": (0.4, 0.6, 0.8)},
    "fuzzy_recall": SIZES,
    "selective_copying": SIZES | {"task.length": (512, 1024), "task.tokens": (32, 64, 96)},
    "compression": SIZES | {"task.length": (64, 128, 256)},
    "memorization": {"task.vocab_size": (512, 1024, 2048, 4096, 8192)},
}


def mad() -> Study:
    """All settings of Poli et al. 2024 (arXiv:2403.17844), for 20 epochs in place of 200, at three rates and one weight decay."""
    mixers = ("attention", "mamba", "gla", "deltanet", "gated_deltanet", "hyena", "retnet", "rwkv7")
    settings = {
        (task, f"{field.rpartition('.')[2]} {value}"): {field: value}
        for task, fields in HARDER.items()
        for field, values in fields.items()
        for value in values
    }
    settings = {(task, "base"): {} for task in HARDER} | settings
    jobs = tuple(
        Job(
            mixer,
            f"mad:task={task},mixer={mixer}",
            {"train.steps": 2000} | changes,
            (1e-4, 5e-4, 1e-3),
            SEEDS,
            {f"{task}: {setting}": "test"},
        )
        for mixer in mixers
        for (task, setting), changes in settings.items()
    )
    return Study("MAD, means over all settings", jobs, average=True, merged=True)
