"""ListOps: the distribution of Long Range Arena's generator, its semantics, and reproducibility."""

import dataclasses
import itertools
import multiprocessing
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from experiments.data import listops
from experiments.data.fingerprint import content_sha256
from experiments.data.listops import ListOpsConfig

ROOT = Path(__file__).parents[3]
SMALL = ListOpsConfig(
    max_depth=5, max_args=5, min_length=5, max_length=60, train=3000, validation=50, test=50, seed=7
)
SMALL_SHA256 = "5f635548d64f8f68d044f8206e31207e658689194c2b3d80b77d1eea926b2212"
FULL_BLOCKS = 12


@pytest.fixture(scope="module")
def full_records():
    return [record for block in range(FULL_BLOCKS) for record in listops.draw_block(ListOpsConfig(), block)]


@pytest.fixture(scope="module")
def small():
    return listops.generate(SMALL, workers=1)


def all_records(splits):
    return list(itertools.chain.from_iterable(splits.values()))


def evaluate_backwards(text):
    """An evaluator of another kind: tokens from the right, values on a stack until their operator is met."""
    stack = []
    for token in reversed(text.split()):
        if not token.startswith("["):
            stack.append(token)
            continue
        values = []
        while (value := stack.pop()) != "]":
            values.append(int(value))
        functions = {
            "[MIN": min,
            "[MAX": max,
            "[SM": lambda v: sum(v) % 10,
            "[MED": lambda v: int(statistics.median(v)),
        }
        stack.append(str(functions[token](values)))
    (value,) = stack
    return int(value)


def exact_length_distribution(max_depth, max_args, max_length):
    """P(length = n) for n < max_length, by convolving the distributions of the subtrees level by level."""
    size = 4 * max_length

    def convolve(a, b):
        return np.fft.irfft(np.fft.rfft(a, size) * np.fft.rfft(b, size), size)[:max_length]

    digit = np.zeros(max_length)
    digit[1] = 1
    tree = digit
    for _ in range(max_depth - 1):
        arguments, mixture = tree, np.zeros(max_length)
        for _ in range(2, max_args + 1):
            arguments = convolve(arguments, tree)
            mixture += arguments / (max_args - 1)
        tree = 0.75 * digit
        tree[2:] += 0.25 * mixture[:-2]
    return tree


@pytest.mark.slow
def test_lengths_follow_the_exact_distribution(full_records):
    config = ListOpsConfig()
    exact = exact_length_distribution(config.max_depth, config.max_args, config.max_length)
    exact[: config.min_length + 1] = 0
    accepted = exact.sum()
    assert abs(len(full_records) / (FULL_BLOCKS * listops.BLOCK_DRAWS) - accepted) < 0.004
    counts = np.bincount([len(tokens) for tokens, _ in full_records], minlength=config.max_length)
    assert len(counts) == config.max_length
    distance = np.abs(np.cumsum(counts) / counts.sum() - np.cumsum(exact) / accepted).max()
    assert distance < 1.63 / len(full_records) ** 0.5  # Kolmogorov-Smirnov, 1%


def test_window_is_strict(small):
    lengths = {len(tokens) for records in small.values() for tokens, _ in records}
    assert min(lengths) == 6
    assert max(lengths) == 59
    narrow = dataclasses.replace(SMALL, min_length=8, max_length=10, train=500)
    assert {len(tokens) for tokens, _ in listops.generate(narrow)["train"]} == {9}


def test_values_agree_with_another_evaluator(full_records, small):
    for tokens, label in full_records[:600] + small["train"]:
        assert label == evaluate_backwards(listops.decode(tokens))
        assert label == listops.evaluate(tokens)


def test_labels_and_operators_are_distributed_as_published(full_records):
    labels = Counter(label for _, label in full_records)
    share = {label: count / len(full_records) for label, count in labels.items()}
    assert abs(share[0] - 0.171) < 0.02
    assert abs(share[9] - 0.173) < 0.02
    assert all(0.06 < share[label] < 0.105 for label in range(1, 9))
    tokens = Counter(token for record, _ in full_records for token in record)
    for group in (range(1, 11), range(11, 15)):
        counts = np.array([tokens[token] for token in group])
        assert np.abs(counts / counts.mean() - 1).max() < 0.01
    assert tokens[listops.CLOSE] == sum(tokens[token] for token in range(11, 15))


def test_root_operator_alone_says_little(full_records):
    by_root = {}
    for tokens, label in full_records:
        by_root.setdefault(listops.VOCABULARY[tokens[0]], Counter())[label] += 1
    best = {root: counts.most_common(1)[0] for root, counts in by_root.items()}
    assert abs(sum(count for _, count in best.values()) / len(full_records) - 0.368) < 0.02
    assert best["[MIN"][0] == 0
    assert best["[MAX"][0] == 9
    assert abs(best["[MIN"][1] / by_root["[MIN"].total() - 0.575) < 0.06


@pytest.mark.parametrize(
    "text, value",
    [
        ("7", 7),
        ("[MED 1 2 ]", 1),
        ("[MED 1 8 2 7 ]", 4),
        ("[MED 9 0 4 ]", 4),
        ("[SM 9 9 9 ]", 7),
        ("[MAX 4 [MIN 2 3 ] 9 ]", 9),
        ("[MIN 4 [SM 5 5 ] 9 ]", 0),
    ],
)
def test_semantics(text, value):
    assert listops.evaluate(listops.encode(text)) == value
    assert listops.decode(listops.encode(text)) == text


@pytest.mark.parametrize("text", ["", "1 2", "[MAX 1 2", "[MAX 1 2 ] ]", "]", "[MAX ]", "[MAX 1 ] 2"])
def test_evaluate_refuses_what_is_not_one_expression(text):
    with pytest.raises(ValueError, match="expression"):
        listops.evaluate(listops.encode(text))


def test_encode_names_the_unknown_token():
    with pytest.raises(ValueError, match=r"'\[AVG'"):
        listops.encode("[AVG 1 2 ]")


def test_vocabulary_is_explicit():
    assert listops.VOCABULARY == (
        "<pad>", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "[MIN", "[MAX", "[MED", "[SM", "]",
    )  # fmt: skip
    assert listops.PRESETS["full"] == ListOpsConfig(10, 10, 500, 2000, 96_000, 2_000, 2_000, 0)


def test_content_is_the_committed_one(small):
    assert content_sha256(small) == SMALL_SHA256


def test_content_needs_the_standard_library_alone():
    script = (
        "from experiments.data import listops, fingerprint; "
        f"print(fingerprint.content_sha256(listops.generate(listops.{SMALL}, workers=1)))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == SMALL_SHA256, done.stderr


def test_number_of_workers_does_not_matter(small):
    reported = []
    assert listops.generate(SMALL, workers=2, report=reported.append) == small
    assert len(reported) > 1
    assert sum(reported) == SMALL.total


def test_seed_matters(small):
    assert listops.generate(dataclasses.replace(SMALL, seed=8))["test"] != small["test"]


def test_splits_are_cut_in_order(small):
    other = listops.generate(dataclasses.replace(SMALL, train=2990, validation=60))
    assert all_records(other) == all_records(small)
    assert [len(records) for records in other.values()] == [2990, 60, 50]


def test_sequences_are_distinct():
    tiny = ListOpsConfig(
        max_depth=2, max_args=2, min_length=3, max_length=5, train=300, validation=50, test=50
    )
    records = all_records(listops.generate(tiny))
    assert len({tokens for tokens, _ in records}) == 400  # four operators, two digits: all there are
    with pytest.raises(ValueError, match="only 400 of 401 distinct"):
        listops.generate(dataclasses.replace(tiny, test=51))


def test_a_window_that_is_hardly_ever_met_is_given_up():
    with pytest.raises(ValueError, match="only 0 of .* widen the window"):
        listops.generate(ListOpsConfig(max_depth=4, min_length=400, max_length=600), workers=1)


def test_a_dead_worker_is_reported():
    config = dataclasses.replace(SMALL, train=1_000_000)

    def kill_workers(_):
        for process in multiprocessing.active_children():
            process.kill()

    with pytest.raises(RuntimeError, match="worker process .* died"):
        listops.generate(config, workers=2, report=kill_workers)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(max_args=1), "max_args must be at least 2"),
        (dict(max_depth=0), "max_depth must be at least 1"),
        (dict(test=0), "test must be at least 1"),
        (dict(seed=-1), "seed must be at least 0"),
        (dict(min_length=500, max_length=501), "strictly between"),
        (dict(max_depth=3), "longest tree .* 122 tokens"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ListOpsConfig(**fields)


def test_other_errors():
    with pytest.raises(TypeError, match=r"max_length must be an integer, got 100\.0"):
        ListOpsConfig(max_length=100.0)
    with pytest.raises(ValueError, match="did you mean 'short'"):
        listops.preset_config("shrot")
    with pytest.raises(ValueError, match="workers must be at least 1"):
        listops.generate(SMALL, workers=0)
