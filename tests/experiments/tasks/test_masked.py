"""Masked language modelling: vocabulary, baselines by hand, and both kinds of models trained from the config."""

import json
import math

import numpy as np
import pytest

from experiments import train
from experiments.data.pipeline import IGNORE
from experiments.tasks import make_task


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("masked")
    (root / "corpus").mkdir()
    for number in range(120):
        text = "abcdefgh" * (number % 5 + 2)
        (root / "corpus" / f"{number}.txt").write_text(text, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def task(folder):
    return make_task("masked_language", source=folder / "corpus", data_dir=folder / "data", length=64)


def test_the_mask_is_the_last_token_and_only_chosen_ones_have_labels(task):
    assert task.vocab_size == 258
    batch = task.splits["train"].gather(np.arange(4), 64)
    chosen = batch["labels"] != IGNORE
    assert (batch["inputs"] == 257).sum() > 0
    assert not ((batch["inputs"] == 257) & ~chosen).any()
    assert {*batch["labels"][chosen].tolist()} <= {*b"abcdefgh"}
    assert task.packed > 1


def test_baselines_by_hand(task):
    """Eight letters in a fixed order: each is one in eight, and a neighbour that is seen tells which."""
    found = task.baselines("test")
    assert found["unigram_loss"] == pytest.approx(math.log(8), abs=0.1)
    assert 0.05 < found["unigram_accuracy"] < 0.25
    assert found["neighbours_accuracy"] > 0.9
    assert found["neighbours_loss"] < 0.5


def test_neighbours_that_are_hidden_count_nothing(folder):
    """Of a row whose tokens are all hidden, only the edges of its documents are known besides the frequencies."""
    source = dict(source=folder / "corpus", data_dir=folder / "data", length=64)
    whole = make_task("masked_language", **source, mask_rate=0.99)
    found = whole.baselines("test")
    assert found["neighbours_loss"] < found["unigram_loss"]  # edges of segments are seen
    assert found["neighbours_accuracy"] < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["masked", "replaced"])
def test_models_of_both_kinds_train_from_the_config(folder, tmp_path, kind):
    """Letters in a fixed order are told by their neighbours, and so are replaced ones."""
    source = f"{folder}/corpus"
    argument = f"configs/lm/masked.py:kind={kind},width=32,depth=1,length=64,steps=150,source={source}"
    values = ["task.data_dir=" + str(folder / "data"), "train.eval_every=100.0", "optimizer.warmup_steps=10"]
    values += ["model.mixer_defaults.heads=2", "task.validation=none", "task.test=none"]
    values += ["train.batch_size=8", "train.tensorboard=false", "model.dropout=0"]
    flags = [f"--config.{value}" for value in values]
    assert train.main([f"--config={argument}", *flags, f"--workdir={tmp_path}", "--num_devices=1"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())["test"]
    if kind == "masked":
        assert results["accuracy"] > 0.5
    else:
        assert results["detection_accuracy"] > 1 - results["replaced"] + 0.01
        assert results["found"] > 0.3
