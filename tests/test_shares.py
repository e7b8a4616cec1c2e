"""Shares of the slow tests: together they are all of them."""

import pytest

from tests.shares import in_share, read_share


@pytest.mark.parametrize("n", [1, 2, 3])
def test_every_name_is_in_one_share(n):
    names = [f"test_all[{a}-{b}]" for a in range(20) for b in ("float32", "bfloat16")]
    counts = [sum(in_share(name, (k, n)) for name in names) for k in range(1, n + 1)]
    assert sum(counts) == len(names)
    assert min(counts) > len(names) / n / 2


def test_shares_are_read():
    assert read_share("2/3") == (2, 3)
    for text in ("3/2", "0/2", "2", "a/b", ""):
        with pytest.raises(ValueError, match="expected K/N"):
            read_share(text)
