"""What all synthetic tasks share: draws, rows, seeds, splits, sizes; and one that is trained."""

import jax
import numpy as np
import pytest
from scipy import stats

from experiments import describe
from experiments.data.pipeline import eval_batches
from experiments.parallel.mesh import Devices
from experiments.tasks import TASKS, make_task
from experiments.tasks.synthetic.draws import Draws
from experiments.tasks.synthetic.rows import Rows, joined, next_tokens
from experiments.tasks.synthetic.task import SyntheticTask
from experiments.tasks.tokens import IGNORE
from experiments.training import experiment
from experiments.training.step import means

SIZES = dict(train=40, validation=8, test=12)
SYNTHETIC = {name: task for name, task in TASKS.items() if issubclass(task, SyntheticTask)}
SMALL = {
    "mqar": dict(vocab_size=50),
    "selective_copying": dict(length=30, tokens=5),
    "induction_heads": dict(length=20, extrapolate=(12, 50)),
    "regular_languages": dict(words=(2, 4), word_length=(1, 9)),
}
# Rows of tokens, unlike those of vectors, and of one sequence, unlike pairs of a source and a target.
OF_TOKENS = [name for name, task in SYNTHETIC.items() if task.output_size is None]
OF_ONE = [name for name, task in SYNTHETIC.items() if not task.has_source]
EXTRA = {"addition": 4, "addition_hints": 4, "copy": 3, "copy_unique": 3, "count": 3, "induction_heads": 2}
EXTRA |= {"mode": 3, "parity": 4, "sorting": 3, "sorting_hints": 3, "word_problem": 4}


def small(name, **options):
    return make_task(name, **(SIZES | SMALL.get(name, {}) | options))


def whole(task, split):
    """All rows of a split."""
    rows = task.splits[split]
    return rows.gather(np.arange(len(rows)), int(rows.lengths.max()))


def real_tokens(rows):
    """True for tokens, False for padding; without segment ids all rows are whole."""
    return rows["segment_ids"] == 1 if "segment_ids" in rows else np.ones(rows["inputs"].shape, bool)


def test_draws_depend_on_the_key_and_the_example_alone():
    numbers = np.array([3, 0, 7, 10**9])
    one = Draws(("a", 5), numbers)
    together = one.bits(3), one.integers(0, 10, 2, 2), one.child(2).uniform(2), one.distinct(9, 4)
    for row, _number in enumerate(numbers):
        alone = Draws(("a", 5), numbers[row : row + 1])
        single = alone.bits(3), alone.integers(0, 10, 2, 2), alone.child(2).uniform(2), alone.distinct(9, 4)
        for many, few in zip(together, single, strict=True):
            np.testing.assert_array_equal(many[row], few[0])
    streams = [Draws(key, np.arange(4)).bits(5) for key in (("a", 5), ("a", 6), ("b", 5), (5, "a"), ("a",))]
    assert len(np.unique(np.stack(streams))) == 5 * 20
    # The same numbers on every machine, forever.
    assert Draws(("a", 5), np.array([3])).bits(1)[0, 0] == FIRST_BITS


FIRST_BITS = 3172341323381753636


@pytest.mark.parametrize(
    "draw, values",
    [
        (lambda d: d.integers(2, 7, 6), 5),
        (lambda d: (d.uniform(6) * 8).astype(int), 8),
        (lambda d: d.distinct(5, 2) @ [5, 1], 20),
        (lambda d: d.distinct(np.full((len(d), 2), 4), 3, 2) @ [16, 4, 1], 24),
        (lambda d: d.order(4) @ [64, 16, 4, 1], 24),
        (lambda d: (d.bits(4) & np.uint64(7)).astype(int), 8),
    ],
)
def test_draws_are_uniform(draw, values):
    found = draw(Draws(("uniform",), np.arange(20_000)))
    counts = np.unique(found, return_counts=True)[1]
    assert len(counts) == values
    assert stats.chisquare(counts).pvalue > 1e-3


def test_weighted_draws_follow_the_weights_one_after_the_other():
    weights = np.array([1.0, 2.0, 4.0])
    drawn = Draws(("weights",), np.arange(30_000)).weighted(weights, 2)
    for first in range(3):
        for second in {0, 1, 2} - {first}:
            expected = weights[first] / 7 * weights[second] / (7 - weights[first])
            share = np.mean((drawn == [first, second]).all(axis=1))
            assert share == pytest.approx(expected, abs=5 * np.sqrt(expected / 30_000))


def test_parts_are_joined():
    text, lengths = joined(
        [(np.array([[1, 2, 3], [4, 5, 6]]), np.array([3, 1])), (np.array([[7], [8]]), 1)], 5
    )
    np.testing.assert_array_equal(text, [[1, 2, 3, 7, 0], [4, 8, 0, 0, 0]])
    found = next_tokens(text, lengths, first=np.array([2, 1]))
    np.testing.assert_array_equal(found["inputs"], [[1, 2, 3, 0], [4, 0, 0, 0]])
    np.testing.assert_array_equal(found["labels"], [[-1, 3, 7, -1], [8, -1, -1, -1]])
    np.testing.assert_array_equal(found["lengths"], [3, 1])


def test_rows_that_are_kept_and_rows_that_are_not_are_the_same(monkeypatch):
    kept = whole(small("induction_heads"), "train")
    monkeypatch.setattr("experiments.tasks.synthetic.rows.AT_ONCE", 100)
    in_parts = whole(small("induction_heads"), "train")
    monkeypatch.setattr("experiments.tasks.synthetic.rows.LARGEST_KEPT", 0)
    alone = small("induction_heads").splits["train"].gather(np.array([7, 3]), 25)
    for name, array in kept.items():
        np.testing.assert_array_equal(in_parts[name], array)
        np.testing.assert_array_equal(alone[name][:, :20], array[[7, 3]])
    assert np.all(alone["segment_ids"][:, 20:] == 0)
    assert np.all(alone["labels"][:, 20:] == IGNORE)
    with pytest.raises(ValueError, match="20 tokens does not fit into a width of 19"):
        small("induction_heads").splits["train"].gather(np.array([7]), 19)
    with pytest.raises(ValueError, match="a split of 0 sequences"):
        Rows(None, (), count=0, width=3)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_rows_follow_from_the_seed(name):
    first, again, other = small(name), small(name), small(name, seed=1)
    assert first.manifest == again.manifest != other.manifest
    for split in first.splits:
        for field, array in whole(first, split).items():
            np.testing.assert_array_equal(array, whole(again, split)[field])
    assert not np.array_equal(whole(first, "train")["inputs"], whole(other, "train")["inputs"])


@pytest.mark.parametrize("name", [name for name in OF_TOKENS if name in OF_ONE])
def test_shapes_types_and_ranges(name):
    task = small(name)
    assert len(task.splits) == 3 + EXTRA.get(name, 0)
    for split, source in task.splits.items():
        rows = whole(task, split)
        assert len(source) == SIZES.get(split, SIZES["test"])
        assert len(source.lengths) == len(source)
        for array in rows.values():
            assert array.dtype == np.int32
            assert array.shape == rows["inputs"].shape
        real = real_tokens(rows)
        np.testing.assert_array_equal(real.sum(axis=1), source.lengths)
        assert np.all(real[:, :-1] >= real[:, 1:])
        assert np.all(rows["inputs"] >= 0)
        assert np.all(rows["inputs"] < task.vocab_size)
        assert np.all(rows["inputs"][~real] == 0)
        assert np.all(rows["labels"][~real] == IGNORE)
        assert np.all(rows["labels"] >= IGNORE)
        assert np.all(rows["labels"] < task.vocab_size)
        assert np.all((rows["labels"] != IGNORE).any(axis=1))
    assert 0 < task.baselines()["chance"] < 1


@pytest.mark.parametrize("name", OF_ONE)
def test_segment_ids_are_there_only_where_rows_of_a_split_are_shorter_than_the_batch(name):
    task = small(name)
    ragged = {"addition", "copy", "parity", "sorting", "regular_languages"}
    ragged |= {"addition_hints", "copy_unique", "count", "mode", "sorting_hints", "word_problem"}
    assert {"train", "validation", "test"} <= task.splits.keys()
    for split, source in task.splits.items():
        width, shortest = int(source.lengths.max()), int(source.lengths.min())
        if split in ("train", "validation", "test"):
            assert (shortest < width) == (name in ragged)
        # One row, the longest: what a batch has does not depend on which rows are drawn.
        longest = np.array([np.argmax(source.lengths)])
        assert ("segment_ids" in source.gather(longest, width)) == (shortest < width)
        wider = source.gather(longest, width + 3)["segment_ids"]
        np.testing.assert_array_equal(wider, [[1] * width + [0] * 3])
    assert task.padding == "end"
    assert not task.packed


@pytest.mark.parametrize(
    "name",
    sorted(SYNTHETIC.keys() - {"mad_memorization", "parity", "copy", "sorting", "sorting_hints", "addition"}),
)
def test_no_sequence_is_in_two_splits(name):
    task = small(name)
    rows = [
        tuple(row.ravel())
        for split in ("train", "validation", "test")
        for row in whole(task, split)["inputs"]
    ]
    # Rows of one width, and too many different ones for chance.
    assert len(set(rows)) == len(rows)


def guessed(name, rows):
    """The accuracy of a guess among the tokens that are answers, but for an end that all rows have."""
    answers = [labels[labels != IGNORE] for labels in rows["labels"]]
    ends = {answer[-1] for answer in answers}
    kinds = set().union(*map(set, answers)) - (ends if len(ends) == 1 else set())
    if getattr(TASKS[name], "names_items", False):  # the end is one of the items that are pointed at
        kinds |= ends
    if name == "addition_hints":  # the letters before digits are known
        kinds &= set(range(10))
    if name == "mode":  # the symbol is one of those of its string
        strings = [inputs[real] for inputs, real in zip(rows["inputs"], real_tokens(rows), strict=True)]
        return 1 / max(len(kinds & set(string)) for string in strings)
    if name == "mad_compression":  # the end, which is known, is counted
        return ((len(answers[0]) - 1) / len(kinds) + 1) / len(answers[0])
    return 1 / len(kinds)


@pytest.mark.parametrize("name", OF_TOKENS)
def test_chance_is_the_accuracy_of_guessing(name):
    task = small(name, test=400)
    # One value of mad_memorization has no key.
    assert task.chance == pytest.approx(guessed(name, whole(task, "test")), rel=0.01)


def test_tasks_with_a_source_have_the_strings_of_those_without():
    for name in ("copy", "sorting"):
        assert make_task(f"{name}_source").symbols == make_task(name).symbols


def test_sizes_are_known_without_data():
    config = dict(
        seed=0,
        task=dict(name="mqar", vocab_size=100),
        model=dict(
            kind="language_model", width=8, depth=1, pattern=("attention",), mixer_defaults=dict(heads=2)
        ),
    )
    assert experiment.model_without_data(config).config.input.vocab_size == 100
    assert describe.describe(config, [16])["kind"] == "language_model"


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("mqar", dict(length=62, pairs=16), "length=62 with pairs=16"),
        ("mqar", dict(vocab_size=8), "has not 4 keys"),
        ("mqar", dict(extrapolate=((63, 2),)), "length=63"),
        ("mqar", dict(train=0), "train=0; expected at least 1"),
        ("mqar", dict(seed=-1), "seed=-1"),
        ("mqar", dict(pair=3), "no option 'pair'; did you mean 'pairs'"),
        ("selective_copying", dict(vocab_size=3), "vocab_size=3"),
        (
            "induction_heads",
            dict(extrapolate=(2,)),
            r"extrapolate=\(2,\); expected a tuple, each value at least 3",
        ),
        ("associative_recall", dict(length=41), "length=41"),
        ("mad_in_context_recall", dict(noise=0.2), "noise=0.2 with noise_vocab_size=0"),
        ("mad_noisy_recall", dict(vocab_size=17), "vocab_size=17"),
        ("mad_fuzzy_recall", dict(vocab_size=6), "expected at least 7"),
        ("mad_selective_copying", dict(length=32), "length=32"),
        ("mad_memorization", dict(length=31), "length=31"),
        ("copy", dict(lengths=(5, 4)), r"lengths=\(5, 4\)"),
        ("parity", dict(extrapolate=(0,)), r"extrapolate=\(0,\); expected"),
        ("regular_languages", dict(states=(3, 5)), r"states=\(3, 5\)"),
        ("regular_languages", dict(letters=32), "at most 31"),
    ],
)
def test_errors(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_task(name, **options)


@pytest.mark.slow
def test_a_small_model_learns_to_recall():
    """One layer of DeltaNet on multi-query recall, through the parts that training is made of."""
    config = dict(
        seed=0,
        task=dict(name="mqar", vocab_size=24, length=16, pairs=2, train=2000, validation=64, test=64),
        model=dict(
            kind="language_model",
            width=32,
            depth=1,
            pattern=("deltanet",),
            mixer_defaults=dict(heads=1, max_length=5),  # which this one does not have
            channel="none",
        ),
        optimizer=dict(learning_rate=1e-2, warmup_steps=10, clip_norm=1.0),
        train=dict(batch_size=32, steps=120),
        data=dict(prefetch=0),
    )
    plan = experiment.build(config)
    functions = plan.step_functions(Devices(jax.local_devices()[:1]))
    state = functions.layout.initial(0)
    losses = []
    for batch in plan.train_batches():
        state, metrics = functions.train(state, batch)
        sums = dict(zip(functions.train_metric_names, np.asarray(metrics), strict=False))
        losses.append(sums["loss"] / sums["count"])
    assert losses[0] > 2
    assert np.mean(losses[-10:]) < 1
    totals = functions.zero_totals()
    for batch in eval_batches(plan.task.splits["test"], batch_size=24):
        totals = functions.evaluate(state.evaluated, state.statistics, totals, batch)
    found = means(functions.metric_names, np.asarray(totals))
    assert found["accuracy"] > 0.6  # guessing: 0.08
    assert found["sequence_accuracy"] <= found["accuracy"]
