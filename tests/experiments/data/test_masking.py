"""Hidden tokens: how many, what stands in their place, passes with choices of their own, and counts of neighbours."""

import numpy as np
import pytest

from experiments.data.masking import Masked, Masking, neighbours
from experiments.data.pipeline import IGNORE, train_iterator
from experiments.data.sequences import Sequences

MASK = 20
RNG = np.random.default_rng(0)
LENGTHS = np.array([40, 7, 100, 1])
ROWS = Sequences(
    RNG.integers(0, MASK, LENGTHS.sum()).astype(np.uint8), np.cumsum([0, *LENGTHS]), np.zeros(4, np.int64)
)


def gathered(masking, indices=(0, 1, 2, 3)):
    batch = Masked(ROWS, masking, mask=MASK).gather(np.array(indices), 100)
    return batch["inputs"], batch["labels"], batch["segment_ids"] != 0


def test_the_chosen_tokens_are_a_part_of_each_row():
    inputs, labels, real = gathered(Masking(mask_rate=0.15, masked=1.0, random=0.0))
    whole = ROWS.gather(np.arange(4), 100)["inputs"]
    chosen = labels != IGNORE
    np.testing.assert_array_equal(chosen.sum(1), [6, 1, 15, 1])
    assert not (chosen & ~real).any()
    np.testing.assert_array_equal(labels[chosen], whole[chosen])
    np.testing.assert_array_equal(inputs, np.where(chosen, MASK, whole))


def test_of_the_chosen_ones_a_part_is_hidden_replaced_or_kept():
    """Over 200 passes, 80, 10 and 10%; a random token is the hidden one once in twenty."""
    passes = 4 * np.arange(200) + 2
    inputs, labels, _ = gathered(Masking(), passes)
    chosen = labels != IGNORE
    count = chosen.sum()
    assert count == 200 * 15
    hidden, kept = ((inputs == what) & chosen for what in (MASK, labels))
    assert abs(hidden.sum() / count - 0.8) < 0.03
    assert abs(kept.sum() / count - (0.1 + 0.1 / MASK)) < 0.03
    assert abs((chosen & ~hidden & ~kept).sum() / count - 0.1 * (1 - 1 / MASK)) < 0.03
    others = inputs[chosen & ~hidden & ~kept]
    assert {*others.tolist()} == {*range(MASK)}
    assert np.all(chosen.mean(0) > 0.02)  # each place of the row


def test_passes_and_seeds_have_choices_of_their_own_and_a_step_its_batch():
    first, again, later, seeded = (
        gathered(Masking(mask_seed=seed), [row])[1] for seed, row in ((0, 2), (0, 2), (0, 6), (1, 2))
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(first != later)
    assert np.any(first != seeded)
    source = Masked(ROWS, Masking(), mask=MASK)
    batches = list(train_iterator(source, batch_size=2, seed=3, num_steps=4, prefetch=0))
    assert len({batch["labels"].tobytes() for batch in batches}) == 4
    resumed = train_iterator(source, batch_size=2, seed=3, num_steps=4, prefetch=0)
    (
        resumed.set_state({"next_index": 2}) if "next_index" in resumed.get_state() else next(resumed),
        next(resumed),
    )
    assert [len(batch["inputs"]) for batch in batches] == [2] * 4


def test_neighbours_and_counts_by_hand():
    tokens, ids = np.array([[3, 4, 4, 5, 0]]), np.array([[1, 1, 1, 2, 0]])
    first, second = neighbours({"segment_ids": ids}, tokens, 9)
    assert sorted(zip(first.tolist(), second.tolist(), strict=True)) == sorted(
        [(9, 3), (3, 4), (4, 4), (4, 9), (9, 5), (5, 9)]
    )
    source = Masked(ROWS, Masking(), mask=MASK)
    np.testing.assert_array_equal(source.token_counts(), np.bincount(ROWS.tokens, minlength=MASK))
    assert source.pair_counts()[MASK, ROWS.tokens[0]] >= 1
    np.testing.assert_array_equal(source.pair_counts()[:MASK].sum(1), source.token_counts())


@pytest.mark.parametrize(
    "options", [{"mask_rate": 0.0}, {"masked": 0.8, "random": 0.3}, {"mask_seed": -1}, {"mask_rate": 1.5}]
)
def test_refusals(options):
    with pytest.raises(ValueError, match="mask"):
        Masking(**options)
