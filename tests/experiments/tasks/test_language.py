"""Language modelling: the metric and baseline by hand, a model that trains and resumes, and what is refused."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import train
from experiments.config.loading import to_plain
from experiments.data import prepare
from experiments.data.pipeline import IGNORE, eval_batches
from experiments.data.text.documents import split_of
from experiments.runs.directory import RunDirectory, WorkdirError
from experiments.runs.logs import read_lines
from experiments.tasks import make_task

CONFIG = """
from ml_collections import ConfigDict

def get_config(arg=""):
    config = ConfigDict()
    config.seed = 0
    config.task = dict(name="language", source="SOURCE", data_dir="DATA", length=16)
    config.model = dict(kind="language_model", width=8, depth=1, pattern=("lru",), mixer_defaults=dict(causal=True))
    config.data = dict(prefetch=0)
    config.train = dict(batch_size=4, steps=4, eval_every=100.0, log_every=1, checkpoint_every=2, tensorboard=False)
    config.optimizer = dict(learning_rate=1e-2, warmup_steps=1, schedule="constant")
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A made corpus of 120 short files, with a config beside it."""
    root = tmp_path_factory.mktemp("language")
    (root / "corpus").mkdir()
    for number in range(120):
        (root / "corpus" / f"{number}.txt").write_text(f"é{number} " * (number % 7 + 1), encoding="utf-8")
    text = CONFIG.replace("SOURCE", str(root / "corpus")).replace("DATA", str(root / "data"))
    (root / "config.py").write_text(text)
    return root


@pytest.fixture(scope="module")
def task(folder):
    return make_task("language", source=folder / "corpus", data_dir=folder / "data", length=16)


def text_bytes(folder, split):
    files = (folder / "corpus").iterdir()
    return [file.read_bytes() for file in files if split_of(file.name) == split]


@pytest.mark.parametrize("tokenizer", ["bytes", "characters"])
def test_bits_per_byte_of_uniform_predictions(folder, tokenizer):
    """log2(vocabulary) bits for every token and end, per byte of the text."""
    task = make_task(
        "language", source=folder / "corpus", data_dir=folder / "data", length=16, tokenizer=tokenizer
    )
    documents = text_bytes(folder, "test")
    sums = dict(bits_per_byte=0.0, bits_per_byte_count=0.0, count=0.0)
    for batch in eval_batches(task.splits["test"], batch_size=3):
        logits = jnp.zeros((*batch["inputs"].shape, task.vocab_size))
        found = task.loss(logits, batch)[1]
        sums = {name: value + float(found[name]) for name, value in sums.items()}
    # The first token of a document is never predicted, and its end is; each begins with a character of two bytes.
    first = 1 if tokenizer == "bytes" else 2
    units = [len(text) if tokenizer == "bytes" else len(text.decode()) for text in documents]
    lost = len(documents) * first
    assert sums["count"] == sum(units)
    assert sums["bits_per_byte_count"] == sum(map(len, documents)) - lost
    assert sums["bits_per_byte"] == pytest.approx(sum(units) * math.log2(task.vocab_size), rel=1e-5)


def test_the_baseline_by_hand(folder, task):
    counts = np.ones(257)
    for text in text_bytes(folder, "train"):
        np.add.at(counts, [*text[1:], 256], 1)
    bits = -np.log2(counts / counts.sum())
    tests = text_bytes(folder, "test")
    expected = sum(bits[[*text[1:], 256]].sum() for text in tests) / sum(len(text) - 1 for text in tests)
    assert task.baselines("test") == {"unigram_bits_per_byte": pytest.approx(expected)}


def test_attributes(folder, task):
    assert (task.vocab_size, task.tokenizer.end) == (257, 256)
    assert task.packed == max(split.segments for split in task.splits.values()) > 1
    other = make_task(
        "language",
        source=folder / "corpus",
        data_dir=folder / "data",
        length=16,
        packing="concatenate",
        reset=False,
        train=2,
    )
    assert other.packed is False
    assert len(other.splits["train"]) == 2
    assert other.manifest != task.manifest
    assert other.manifest["content_sha256"] == task.manifest["content_sha256"]


def train_on(folder, name, *flags):
    return train.main(
        [f"--config={folder / 'config.py'}", f"--workdir={folder / name}", "--num_devices=1", *flags]
    )


def losses(folder, name):
    lines = read_lines(folder / name / "metrics.jsonl")
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]


TRAINED = {
    "best_fit": (),
    "stages": ("--config.task.stages=((4,1),(8,2))",),
    "decompose": ("--config.task.packing=decompose", "--config.task.shortest=4"),
    "similar": (
        "--config.task.packing=concatenate",
        "--config.task.reset=False",
        "--config.task.order=similar",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("rows", TRAINED)
def test_a_run_resumes_exactly(folder, rows):
    whole, parts, flags = f"{rows}-whole", f"{rows}-parts", TRAINED[rows]
    assert train_on(folder, whole, *flags) == 0
    assert train_on(folder, parts, "--config.train.steps=2", *flags) == 0
    assert train_on(folder, parts, *flags) == 0
    assert len(losses(folder, whole)) == 4
    assert losses(folder, parts) == losses(folder, whole)
    assert "bits_per_byte" in (folder / whole / "results.json").read_text()


def test_options_of_training_leave_evaluations_as_they_are(folder):
    options = dict(source=folder / "corpus", data_dir=folder / "data", length=16)

    def rows(task, split):
        source = task.splits[split]
        return source.gather(np.arange(len(source)), 16)

    joined = dict(packing="concatenate", reset=False)
    plain = {True: make_task("language", **options), False: make_task("language", **options, **joined)}
    for given in (
        dict(stages=((4, 3),)),
        dict(packing="decompose", shortest=4),
        dict(order="similar", **joined),
    ):
        task, other = make_task("language", **options, **given), plain["order" not in given]
        assert task.manifest["rows"] != other.manifest["rows"]
        assert json.loads(json.dumps(task.manifest)) == task.manifest
        for split in ("validation", "test"):
            for name, array in rows(other, split).items():
                np.testing.assert_array_equal(rows(task, split)[name], array)
        assert task.baselines("test").keys() == other.baselines("test").keys()
    decomposed = make_task("language", **options, packing="decompose", shortest=4)
    kept = sum(int(size) * count for size, count in decomposed.manifest["rows"]["decomposed"]["rows"].items())
    counted = decomposed.splits["train"].label_counts(257).sum()
    assert (
        kept
        == counted
        == plain[True].splits["train"].label_counts(257).sum() - decomposed.splits["train"].dropped
    )


def test_similar_documents_are_joined_in_training(tmp_path):
    """Two topics, whose documents alternate, stand apart in the text of the training split."""
    records = [
        f"{'Rain falls on the hills. ' * 3 if n % 2 else 'Trains stop at noon here. ' * 3}{n}"
        for n in range(80)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in records))
    options = dict(
        source=tmp_path / "a.jsonl", data_dir=tmp_path, length=8, packing="concatenate", reset=False
    )
    texts = {}
    for order in ("given", "similar"):
        task = make_task("language", **options, order=order)
        rows = task.splits["train"].gather(np.arange(len(task.splits["train"])), 8)
        tokens = [rows["inputs"][0, 0], *rows["labels"][rows["labels"] != IGNORE]]
        texts[order] = "".join("|" if token == 256 else chr(token) for token in tokens).split("|")
    assert sorted(texts["given"]) == sorted(texts["similar"])
    changes = {
        order: sum(a[:4] != b[:4] for a, b in itertools.pairwise(found)) for order, found in texts.items()
    }
    assert changes["similar"] < 10 < 30 < changes["given"]


def test_buckets_are_refused_where_the_task_chooses_widths(folder, capsys):
    assert train_on(folder, "none", *TRAINED["stages"], "--config.data.bucket_bounds=(8,16)", "--check") == 2
    assert "data.bucket_bounds=(8, 16), but the task chooses the widths of training batches, 4, 8, 16" in (
        capsys.readouterr().err
    )


def test_a_run_refuses_a_changed_corpus(folder, task, tmp_path):
    config = to_plain({"seed": 0, "task": {}, "model": {}, "optimizer": {}, "train": {}})
    options = dict(source=folder / "corpus", data_dir=folder / "data", length=16)
    RunDirectory.open(tmp_path / "run", config).begin(config, task.manifest, "")
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)  # a run without a checkpoint gives way
    RunDirectory.open(tmp_path / "run", config).begin(config, make_task("language", **options).manifest, "")
    changed = folder / "corpus" / "7.txt"
    text = changed.read_bytes()
    changed.write_bytes(text + b"!")
    try:
        with pytest.raises(WorkdirError, match="was trained on other data: content_sha256, parameters"):
            RunDirectory.open(tmp_path / "run", config).begin(
                config, make_task("language", **options).manifest, ""
            )
    finally:
        changed.write_bytes(text)


def test_prepare(folder, capsys):
    flags = ["text", f"--source={folder / 'corpus'}", f"--data_dir={folder / 'data'}"]
    assert prepare.main(flags) == 0
    assert "text version 1" in capsys.readouterr().out
    assert prepare.main([*flags, "--tokenizer=byte"]) == 2
    assert "tokenizer='byte'; expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(length=0), ValueError, "length=0"),
        (dict(length=2.5), TypeError, "length=2.5"),
        (dict(train=0), ValueError, "train=0"),
        (dict(reset="no"), TypeError, "reset='no'; expected True or False"),
        (dict(packing="fit"), ValueError, "packing='fit'; expected one of"),
        (dict(reset=False), ValueError, "packing='best_fit' with reset=False"),
        (
            dict(packing="decompose", length=12),
            ValueError,
            "length=12 with packing='decompose'; expected a power",
        ),
        (dict(packing="decompose", reset=False), ValueError, "packing='decompose' with reset=False"),
        (
            dict(packing="decompose", stages=((4, 1),)),
            ValueError,
            "which has lengths of its own; expected \\(\\)",
        ),
        (dict(cycles=3), ValueError, "cycles=3 has no effect with packing='best_fit'; expected None"),
        (dict(packing="decompose", cycles=0), ValueError, "cycles=0"),
        (
            dict(stages=((3, 5),)),
            ValueError,
            "expected lengths that increase, are less than 16 and divide it",
        ),
        (dict(order="similar"), ValueError, "order='similar' with packing='best_fit' and reset=True"),
        (dict(order="near"), ValueError, "order='near'"),
        (dict(sorce="a"), ValueError, "did you mean 'source'"),
    ],
)
def test_bad_options_are_refused(folder, options, error, words):
    given = dict(source=folder / "corpus", data_dir=folder / "data", length=16) | options
    with pytest.raises(error, match=words):
        make_task("language", **given)


def test_labels_out_of_the_vocabulary_are_refused(task):
    batch = jax.tree.map(jnp.asarray, task.splits["test"].gather(np.array([0]), 16))
    with pytest.raises(ValueError, match="labels"):
        task.loss(jnp.zeros((1, 16, 64)), batch | {"weight": jnp.ones(1)})
