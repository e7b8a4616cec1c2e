"""A task and a model small enough to train in a test, and `experiments.train` on them as a command.

python -m tests.experiments.tiny --config=tests/experiments/tiny_config.py --workdir=DIR
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import train
from experiments.data.sequences import Sequences
from experiments.tasks.classification import cross_entropy
from experiments.tasks.task import Task
from experiments.training import experiment
from layers.segments import Segments

WIDTHS = (4, 8)
CLASSES = 3


class TinyTask(Task):
    """Rows of token ids; the label of a row is its first token.

    Options for tests: `slow` seconds to make a batch; `poison`, a training example whose loss is not a number; `poison_validation`,
    the same for the first of validation; `unlabelled`, training examples without a label.
    """

    vocab_size = CLASSES + 2
    num_classes = CLASSES
    padding = "end"
    packed = False

    def __init__(
        self,
        *,
        examples: int = 48,
        slow: float = 0.0,
        poison: int | None = None,
        poison_validation: bool = False,
        unlabelled: tuple[int, ...] = (),
        data_seed: int = 0,
    ):
        poisoned = {"train": poison, "validation": 0 if poison_validation else None}
        counts = {"train": examples, "validation": 10, "test": 11}
        self.splits = {
            name: _make_split(count, seed, slow, poisoned.get(name), unlabelled if name == "train" else ())
            for seed, (name, count) in enumerate(counts.items(), start=10 * data_seed)
        }
        self.manifest = {"name": "tiny", "parameters": {"examples": examples, "seed": data_seed}}

    def loss(self, outputs, batch):
        mean, sums = cross_entropy(outputs, batch | {"weight": batch["weight"] * batch["labelled"]})
        sums["loss"] = jnp.where(jnp.any(batch["poison"] > 0), jnp.nan, sums["loss"])
        return mean, sums

    def baselines(self, split="test"):
        return {"majority": float(np.mean(self.splits[split].labels == 0))}


class _Split(Sequences):
    slow = 0.0
    poison: int | None = None
    unlabelled: tuple[int, ...] = ()

    def gather(self, indices, width):
        time.sleep(self.slow)
        poison = np.zeros(len(indices), np.float32)
        if self.poison is not None:
            poison[indices == self.poison] = 1.0
        labelled = np.isin(indices, self.unlabelled, invert=True).astype(np.float32)
        return super().gather(indices, width) | {"poison": poison, "labelled": labelled}


def _make_split(
    count: int, seed: int, slow: float, poison: int | None, unlabelled: tuple[int, ...]
) -> _Split:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, WIDTHS[-1] + 1, count)
    tokens = rng.integers(1, CLASSES + 1, lengths.sum())
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    split = _Split(tokens, offsets, tokens[offsets[:-1]] - 1)
    split.slow, split.poison, split.unlabelled = slow, poison, unlabelled
    return split


class TinyModel(nnx.Module):
    """Embedding, a norm with running statistics, dropout, a parameter in the group "ssm/dt", and a linear head."""

    def __init__(self, vocab_size, num_classes, *, width=4, norm=True, dropout=0.0, rngs):
        keys = rngs.params(), rngs.params()
        self.dropout, self.norm = dropout, norm
        self.table = nnx.Param(jax.random.normal(keys[0], (vocab_size, width)))
        self.log_dt = nnx.Param(jnp.full((width,), -1.0), group="ssm/dt")
        self.head = nnx.Param(0.5 * jax.random.normal(keys[1], (width, num_classes)))
        self.bias = nnx.Param(jnp.zeros(num_classes), group="no_decay")
        if norm:
            self.mean = nnx.BatchStat(jnp.zeros(width))

    def __call__(self, inputs, state=None, *, segment_ids=None, key=None):
        x = self.table[...][inputs] * Segments.of(segment_ids).real[..., None]
        if self.norm:
            mean = self.mean[...]
            if key is not None:
                mean = x.mean((0, 1))
                self.mean[...] = 0.9 * self.mean[...] + 0.1 * jax.lax.stop_gradient(mean)
            x = x - mean[None, None]
        decay = jnp.exp(-jnp.exp(self.log_dt[...]))[None, :] ** jnp.arange(x.shape[1])[:, None]
        x = jnp.einsum("btd,td->bd", x, decay)
        if key is not None and self.dropout:
            x = jnp.where(jax.random.bernoulli(key, 1 - self.dropout, x.shape), x / (1 - self.dropout), 0)
        return x @ self.head[...] + self.bias[...][None], None


def make_tiny_task(name, **options):
    if name != "tiny":
        raise ValueError(f"unknown task {name!r}")
    return TinyTask(**options)


def build_tiny_model(config, *, rngs):
    return TinyModel(rngs=rngs, **config)


def tiny_config(**sections):
    """A plain config of the tiny task; keyword arguments are merged into its sections."""
    config = dict(
        seed=0,
        task=dict(name="tiny"),
        model=dict(dropout=0.2),
        optimizer=dict(learning_rate=0.05, weight_decay=0.1, warmup_steps=3, clip_norm=1.0, ema=0.9),
        train=dict(batch_size=8, epochs=4, log_every=1, checkpoint_every=4, tensorboard=False),
        data=dict(bucket_bounds=WIDTHS, prefetch=1),
        mesh={},
    )
    for section, values in sections.items():
        config[section] = values if section == "seed" else config[section] | values
    return config


if __name__ == "__main__":
    experiment.make_task, experiment.build_model = make_tiny_task, build_tiny_model
    sys.exit(train.main())
