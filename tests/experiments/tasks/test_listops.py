"""The ListOps task and the registry of tasks."""

from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data import listops
from experiments.data.cache import CorruptCacheError
from experiments.data.listops_datasets import OFFICIAL_FILES
from experiments.data.pipeline import eval_batches
from experiments.tasks import make_task

SIZES = dict(preset="short", train=300, validation=50, test=60)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def task(data_dir):
    return make_task("listops", **SIZES, seed=5, data_dir=data_dir)


def test_attributes(task):
    assert (task.vocab_size, task.num_classes) == (16, 10)
    assert {name: len(source) for name, source in task.splits.items()} == dict(
        train=300, validation=50, test=60
    )
    parameters = task.manifest["parameters"]
    assert parameters["seed"] == 5
    assert parameters["max_length"] == listops.PRESETS["short"].max_length
    assert max(source.tokens.max() for source in task.splits.values()) < task.vocab_size


def test_loss_over_the_evaluation_batches(task):
    """An oracle scores 1 and a constant answer scores the share of its label, each sequence counting once."""
    oracle = constant = count = 0
    for batch in eval_batches(task.splits["test"], batch_size=25):
        values = [listops.evaluate(row[row > 0].tolist()) for row in batch["inputs"]]
        _, sums = task.loss(10 * jnp.eye(10)[jnp.array(values)], batch)
        oracle += sums["accuracy"]
        constant += task.loss(jnp.broadcast_to(jnp.eye(10)[0], (25, 10)), batch)[1]["accuracy"]
        count += sums["count"]
    assert count == 60
    assert oracle == 60
    assert constant == np.sum(task.splits["test"].labels == 0)


def test_baselines(task):
    assert task.baselines() == task.baselines("test")
    train = [(tokens[0], label) for tokens, label in task.splits["train"].records()]
    majority = Counter(label for _, label in train).most_common(1)[0][0]
    answers = {
        root: Counter(label for other, label in train if other == root).most_common(1)[0][0]
        for root in range(listops.FIRST_OPERATOR, listops.CLOSE)
    }
    for split in ("train", "test"):
        found = task.baselines(split)
        pairs = [(tokens[0], label) for tokens, label in task.splits[split].records()]
        assert found["majority"] == pytest.approx(np.mean([label == majority for _, label in pairs]))
        assert found["root_operator"] == pytest.approx(
            np.mean([label == answers[root] for root, label in pairs])
        )


def test_same_options_same_manifest(task, data_dir):
    assert make_task("listops", **SIZES, seed=5, data_dir=data_dir).manifest == task.manifest
    assert make_task("listops", **SIZES, data_dir=data_dir).manifest["parameters"]["seed"] == 0


def test_official_files(task, tmp_path):
    for split, name in OFFICIAL_FILES.items():
        rows = [f"{listops.decode(tokens)}\t{label}" for tokens, label in task.splits[split].records()]
        (tmp_path / name).write_text("\n".join(["Source\tTarget", *rows, ""]))
    official = make_task("listops", official_dir=str(tmp_path), data_dir=tmp_path)
    assert official.manifest["content_sha256"] == task.manifest["content_sha256"]
    with pytest.raises(ValueError, match="official_dir=.* so seed, preset would have no effect"):
        make_task("listops", official_dir=tmp_path, preset="full", seed=1)


def test_corrupt_cache_is_refused(tmp_path):
    make_task("listops", **SIZES, data_dir=tmp_path)
    (path,) = tmp_path.glob("*/validation.array_record")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptCacheError, match=r"validation\.array_record"):
        make_task("listops", **SIZES, data_dir=tmp_path)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("listop", {}, "unknown task 'listop'; did you mean 'listops'"),
        ("zzz", {}, "unknown task 'zzz'; choose from .*listops"),
        ("listops", dict(presets="full"), "task 'listops' has no option 'presets'; did you mean 'preset'"),
        ("listops", dict(self=1), "no option 'self'"),
        ("listops", dict(preset="large"), "unknown ListOps preset 'large'"),
        ("listops", dict(train=0), "train must be at least 1"),
    ],
)
def test_errors(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_task(name, **options)
