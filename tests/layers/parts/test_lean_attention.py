"""Equal parts of all tiles: the schedule, and attention in it against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.parts.lean_attention import Schedule, lean_attention

LENGTHS, GROUPS, SLOTS = [11, 3, 0, 8], 2, 12


@pytest.mark.slow
@pytest.mark.parametrize("units", [1, 3, 5, 40])
@pytest.mark.parametrize("tile", [2, 4, 16])
def test_units_read_the_same_number_of_consecutive_tiles(units, tile):
    every = [
        (row * GROUPS + g, number)
        for row, length in enumerate(LENGTHS)
        for g in range(GROUPS)
        for number in range(-(-length // tile))
    ]
    schedule = Schedule.of(jnp.asarray(LENGTHS), groups=GROUPS, units=units, tile=tile)
    each = -(-len(every) // units)
    assert (int(schedule.total), int(schedule.each)) == (len(every), each)
    found = [[] for _ in range(units)]
    for step in range(each):
        for unit, (owner, number) in enumerate(zip(*schedule.tiles(step, units), strict=True)):
            if int(owner) < len(LENGTHS) * GROUPS:
                found[unit].append((int(owner), int(number)))
    assert found == [every[unit * each : (unit + 1) * each] for unit in range(units)]


@pytest.mark.slow
@pytest.mark.parametrize(("units", "tile"), [(1, 4), (3, 2), (5, 4), (64, 16)])
def test_any_parts_give_the_same_attention(units, tile):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(4, 6, 5))
    k, v = rng.normal(size=(2, 4, SLOTS, GROUPS, 5))
    # What stands in slots without a token is read by nobody.
    for row, length in enumerate(LENGTHS):
        k[row, length:], v[row, length:] = np.nan, np.nan

    def logits_of(q, keys, row, group, slots):
        return jnp.einsum("urk,unk->urn", q, keys, precision=jax.lax.Precision.HIGHEST)

    options = dict(logits_of=logits_of, units=units, tile=tile)
    piece = lean_attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), jnp.asarray(LENGTHS), **options)
    for row, length in enumerate(LENGTHS):
        for head in range(6):
            g = head // 3
            logits = k[row, :length, g] @ q[row, head]
            powers = np.exp(logits)
            wanted = powers @ v[row, :length, g] / powers.sum() if length else np.zeros(5)
            np.testing.assert_allclose(piece.output[row, 0, head], wanted, atol=1e-6)
            lse = np.log(powers.sum()) if length else -np.inf
            np.testing.assert_allclose(piece.lse[row, 0, head], lse, atol=1e-6)
