"""The config of a tiny language model, for runs in processes of their own: a hybrid on a text that it is given.

The argument, folder=PATH, is the folder of text.txt, which `write_text` writes. Training has two stages, of different widths.
"""

from pathlib import Path

from ml_collections import ConfigDict

STEPS = 24
WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "it",
    "was",
    "for",
    "on",
    "are",
    "as",
    "with",
    "his",
    "they",
    "at",
)


def write_text(folder: Path) -> None:
    """Writes some 20,000 bytes of words, each the one that is 7 k + 3 places on, with k words before it in its line."""
    lines = (" ".join(WORDS[(7 * n + 3 * k * k) % len(WORDS)] for k in range(9)) for n in range(600))
    (folder / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def get_config(arg: str = "") -> ConfigDict:
    folder = arg.partition("=")[2]
    config = ConfigDict()
    config.seed = 0
    config.task = dict(
        name="language",
        source=f"{folder}/text.txt",
        data_dir=f"{folder}/data",
        length=32,
        stages=((16, 8),),
        packing="concatenate",
        validation=16,
        test=16,
    )
    config.model = dict(
        kind="language_model",
        width=32,
        depth=2,
        pattern=("mamba2", "attention"),
        channel="none",
        dropout=0.1,
    )
    config.model.mixers = {"mamba2": dict(head_dim=8, state_size=8), "attention": dict(heads=2)}
    config.data = dict(prefetch=1)
    config.train = dict(
        batch_size=16, steps=STEPS, log_every=1, checkpoint_every=4, eval_every=100.0, tensorboard=False
    )
    config.optimizer = dict(
        learning_rate=3e-3, weight_decay=0.1, warmup_steps=2, schedule="constant", epsilon=1e-3
    )
    config.mesh = dict(fsdp=-1)
    return config
