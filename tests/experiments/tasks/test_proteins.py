"""Masked residues: rows of proteins, the baselines of the stand-in, and models of the config."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.config.command_line import load
from experiments.config.models import sizes_of, with_sizes
from experiments.data.pipeline import IGNORE
from experiments.tasks import make_task
from layers.mixers.bidirectional import Bidirectional
from seqmodels import build_model

CONFIG = "configs/protein/residues.py"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return make_task("proteins", proteins=300, length=64, data_dir=tmp_path_factory.mktemp("proteins"))


def test_rows_are_proteins_whose_chosen_residues_are_labels(task):
    batch = task.splits["train"].gather(np.arange(8), 64)
    chosen = batch["labels"] != IGNORE
    real = batch.get("segment_ids", np.ones_like(batch["inputs"])) != 0
    counts = np.maximum(1, np.round(0.15 * real.sum(1)))
    np.testing.assert_array_equal(chosen.sum(1), counts)
    assert (batch["inputs"] == task.vocab_size - 1).any()
    assert batch["labels"].max() < 20


def test_neighbours_tell_more_than_frequencies_and_less_than_all(task):
    found = task.baselines("validation")
    assert found["neighbours_loss"] < found["unigram_loss"] < math.log(20) + 0.1
    assert found["unigram_accuracy"] < found["neighbours_accuracy"] < 0.5


@pytest.mark.parametrize(
    ("argument", "two_sided"),
    [("", True), (":mixer=bi_lstm", True), (":mixer=attention,kind=replaced", False)],
)
def test_configs_build_models_that_read_both_sides(argument, two_sided, task):
    config = load(f"{CONFIG}{argument}", ())
    model = nnx.eval_shape(lambda: build_model(with_sizes(config, sizes_of(task)), rngs=nnx.Rngs(0)))
    assert not model.stack.causal
    mixers = [m for _, m in nnx.iter_modules(model) if isinstance(m, Bidirectional)]
    assert bool(mixers) == two_sided
    if not argument:
        assert mixers[0].backward.input is mixers[0].forward.input
        assert "mamba" in type(mixers[0].forward).__name__.lower()
    assert jax.tree.leaves(nnx.state(model))
