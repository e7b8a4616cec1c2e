"""Sparse options of `attention`: dilated windows, lists for few queries, global tokens, key mass, in NumPy float64 pair by pair."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.kernels.attention import (
    Logits,
    Mask,
    Tokens,
    attention,
    attention_with_lse,
    compose,
    key_mass,
    schedule,
)
from layers.kernels.attention.options import places, read_options
from layers.kernels.sequence_parallel import attention_by
from tests.layers.kernels.test_attention import B, G, H, close, draw, normal, results, small_blocks  # noqa: F401
from tests.layers.kernels.test_sequence_parallel import mesh_of

T = 40
SEGMENTS = np.array([[0] * 2 + [1] * 17 + [0] + [1] * 4 + [5] * 13 + [0] * 3, [2] * 31 + [0] * 9], np.int32)
LISTS = np.random.default_rng(3).integers(-1, 11, (B, H, T // 2, 2))
LISTS[:, :, 3] = -1
KEYS_OF_HEADS = np.random.default_rng(4).integers(-1, T + 2, (1, H, 5))
BIAS = normal(5, 1, H, T, T)
# Options of the mask as NumPy arrays, and the other options.
COMBINATIONS = {
    "dilated": ({"window": 4, "dilation": 5}, {"causal": True}),
    "dilated_both_sides": ({"window": 3, "dilation": 5, "sink_tokens": 1}, {"segment_ids": SEGMENTS}),
    "global_tokens": (
        {
            "window": 2,
            "global_keys": np.array([[[3, 3, 25, -1]]]),
            "global_queries": np.array([[25, 7, 7], [-1, 0, 90]]),
        },
        {"segment_ids": SEGMENTS, "logits": Logits(bias=BIAS)},
    ),
    "global_keys_of_heads": (
        {"window": 3, "dilation": 2, "global_keys": KEYS_OF_HEADS, "global_queries": np.array([[30, 11]])},
        {"causal": True, "logits": Logits(slopes=jnp.array([1.0, 0.5, 0.25, 0.1]), sink_logits=jnp.ones(H))},
    ),
    "lists_for_two_queries": (
        {"block_indices": LISTS, "block_size": 4, "query_block_size": 2, "global_keys": KEYS_OF_HEADS},
        {"causal": True, "logits": Logits(logit_cap=2.0)},
    ),
    "lists_for_each_query": (
        {"block_indices": LISTS[:1].repeat(2, axis=2), "block_size": 5, "query_block_size": 1},
        {"segment_ids": SEGMENTS},
    ),
    "empty_lists": (
        {"block_indices": np.full((1, 1, 5, 2), -1), "block_size": 8, "global_keys": np.array([[[2, 5]]])},
        {"causal": True},
    ),
    "nothing_listed": ({"block_indices": np.zeros((1, 1, 5, 0), int), "block_size": 8}, {}),
}
# This one takes as long as all others.
SLOW = {"empty_lists"}
combinations = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in COMBINATIONS]
)


def options_of(name):
    mask, options = COMBINATIONS[name]
    mask = {k: jnp.asarray(v, jnp.int32) if isinstance(v, np.ndarray) else v for k, v in mask.items()}
    if "segment_ids" in options:
        options = options | {"segment_ids": jnp.asarray(options["segment_ids"])}
    return {"mask": Mask(**mask), **options}


def seen_by_definition(mask, causal, ids):
    """Whether query i sees key j in head h of row b, one pair at a time."""
    seen = np.zeros((B, H, T, T), bool)
    for b in range(B):
        position, last, count = [], None, 0
        for segment in ids[b]:
            if segment and segment != last:
                last, count = segment, 0
            position.append(count)
            count += bool(segment)
        for h in range(H):

            def of(name, *at):
                """The entries of an array for this row and head, whose axes of size 1 stand for all."""
                return mask[name][tuple(min(i, n - 1) for i, n in zip(at, mask[name].shape, strict=False))]

            for i in range(T):
                for j in range(T):
                    p, r = position[i], position[j]
                    base = True
                    if "window" in mask:
                        steps, rest = divmod(abs(p - r), mask.get("dilation", 1))
                        base = rest == 0 and (steps < mask["window"] if causal else steps <= mask["window"])
                    if "block_indices" in mask:
                        size = mask.get("query_block_size", mask["block_size"])
                        base = base and r // mask["block_size"] in of("block_indices", b, h)[p // size]
                    base = base or r < mask.get("sink_tokens", 0)
                    base = base or ("global_keys" in mask and j in of("global_keys", b, h))
                    base = base or ("global_queries" in mask and i in of("global_queries", b))
                    seen[b, h, i, j] = base and (r <= p or not causal) and ids[b][i] == ids[b][j] != 0
    return seen


def literal(name, arguments):
    """The weights (b, h, t, s) and the outputs (b, t, h, v) in float64."""
    mask, options = COMBINATIONS[name]
    logits, causal = options.get("logits", Logits()), options.get("causal", False)
    ids = options.get("segment_ids", np.ones((B, T), int))
    q, k, v = (np.asarray(arguments[x], np.float64) for x in "qkv")
    k, v = (x.repeat(H // G, axis=2) for x in (k, v))
    a = np.einsum("bihk,bjhk->bhij", q, k) / np.sqrt(q.shape[3])
    if logits.logit_cap is not None:
        a = logits.logit_cap * np.tanh(a / logits.logit_cap)
    if logits.bias is not None:
        a = a + np.asarray(logits.bias)
    if logits.slopes is not None:
        a = a - np.asarray(logits.slopes)[:, None, None] * np.abs(
            np.subtract.outer(np.arange(T), np.arange(T))
        )
    weights = np.exp(a) * seen_by_definition(mask, causal, ids)
    total = weights.sum(3, keepdims=True)
    if logits.sink_logits is not None:
        total = total + np.exp(np.asarray(logits.sink_logits))[:, None, None]
    weights = weights / np.where(total == 0, 1, total)
    return weights, np.einsum("bhij,bjhv->bihv", weights, v)


@pytest.mark.sample(6)
@combinations
def test_outputs_gradients_and_key_mass(name, small_blocks):  # noqa: F811
    """Outputs and masses against pairs in float64; gradients against those of the dense reference."""
    arguments, options = draw(T, T), options_of(name)
    weights, output = literal(name, arguments)
    got, want = (results(arguments, options, impl) for impl in ("xla", "reference"))
    assert got.keys() == want.keys()
    for key in want:
        close(got[key], want[key], 2e-5, f"{name}: {key}")
    close(want["output"], output, 1e-5, f"{name}: pairs")
    counted = np.random.default_rng(6).uniform(size=(B, T, H))
    mass = key_mass(
        arguments["q"], arguments["k"], query_weights=jnp.asarray(counted, jnp.float32), **options
    )
    close(mass, np.einsum("bhij,bih->bjh", weights, counted), 1e-5, f"{name}: mass")


def test_lists_and_gathers_are_what_runs(small_blocks):  # noqa: F811
    """Steps visit the listed blocks alone, for one query at a time too, and global keys add columns, not blocks."""
    arguments = draw(T, T)
    for name, mask in (("lists_for_two_queries", {"global_keys": None}), ("lists_for_each_query", {})):
        options = options_of(name)
        options["mask"] = Mask(**(vars(options["mask"]) | mask))
        options.pop("segment_ids", None)
        options = read_options(**arguments, **options)
        q, k = arguments["q"], arguments["k"]
        assert schedule.uses_lists(q, k, options)
        plan = schedule.schedule(q, k, options, places(q, k, options))
        lists = np.asarray(options.mask.block_indices)
        exist = [
            len({*row} - {-1} - set(range(T // options.mask.block_size, 99))) for row in lists.reshape(-1, 2)
        ]
        assert int((plan.steps.blocks >= 0).sum()) == sum(exist)
        assert plan.q_block == options.mask.query_block_size


@pytest.mark.parametrize("impl", ["reference", "xla"])
def test_what_is_not_finite_stays_where_it_is_seen(impl, small_blocks):  # noqa: F811
    """A global key that is NaN reaches later rows alone; a query that is, its own row alone; neither other gradients."""
    mask = Mask(window=3, global_keys=jnp.array([[[20]]]), global_queries=jnp.array([[5]]))
    shown = np.ones(T, bool)
    shown[20:] = shown[5] = False

    @jax.jit
    def run(arguments):
        def loss(arguments):
            output = attention(**arguments, causal=True, mask=mask, impl=impl)
            return jnp.square(jnp.where(jnp.asarray(shown)[None, :, None, None], output, 0)).sum(), output

        return jax.grad(loss, has_aux=True)(arguments)

    arguments = draw(T, T)
    want_gradients, want = run(arguments)
    for value in (np.nan, np.inf):
        bad = {k: v.at[:, 20].set(value) for k, v in arguments.items()}
        bad["q"] = bad["q"].at[:, 5].set(value)
        gradients, got = run(bad)
        close(got[:, shown], want[:, shown], 1e-6, "outputs")
        assert np.isnan(got[:, ~shown]).all()
        for key, gradient in gradients.items():
            close(gradient, want_gradients[key], 1e-5, f"gradient of {key}")


def test_queries_of_no_weight_count_nowhere():
    """Weights choose the last queries, and one that is NaN and does not count changes no mass."""
    arguments = draw(T, T)
    q, k = arguments["q"], arguments["k"]
    last = (jnp.arange(T) >= T - 4).astype(jnp.float32)[None, :, None]
    want = key_mass(q[:, -4:], k, causal=True, tokens=Tokens(
        q_positions=jnp.arange(T - 4, T)[None], kv_positions=jnp.arange(T)[None]))  # fmt: skip
    got = key_mass(q.at[:, 3].set(jnp.nan), k, causal=True, query_weights=last)
    close(got, want, 1e-6, "mass")
    close(got.sum(1), jnp.full((B, H), 4.0), 1e-6, "sum")


@pytest.mark.parametrize(
    "options, error",
    [
        ({"mask": Mask(dilation=2)}, "dilation=2 changes nothing without window"),
        ({"mask": Mask(window=2, dilation=0)}, "dilation=0; expected at least 1"),
        (
            {"mask": Mask(global_keys=jnp.zeros((1, 1, 2), jnp.int32))},
            "global_keys changes nothing without window",
        ),
        ({"mask": Mask(window=2, global_keys=jnp.zeros((1, 2), jnp.int32))}, "global_keys has shape"),
        ({"mask": Mask(window=2, global_queries=jnp.zeros((1, 2)))}, "global_queries has dtype float32"),
        ({"mask": Mask(window=2, query_block_size=2)}, "query_block_size=2 needs block_indices"),
        (
            {
                "mask": Mask(
                    block_indices=jnp.zeros((1, 1, 9, 2), jnp.int32), block_size=8, query_block_size=2
                )
            },
            "block_indices lists 9 blocks of 2 queries",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(options, error):
    for function in (attention, attention_with_lse):
        with pytest.raises((ValueError, TypeError), match=error):
            function(**draw(T, T), **options)
    with pytest.raises(ValueError, match="query_weights has shape"):
        key_mass(*map(draw(T, T).get, "qk"), query_weights=jnp.ones((B, T)))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["all_gather", "ulysses", "ring"])
def test_on_a_mesh_that_divides_time(method):
    """Dilated windows go round with the keys, and global tokens are left to the compiler."""
    arguments = draw(T, T)
    for name in ("dilated", "global_keys_of_heads"):
        options = options_of(name)
        run = functools.partial(attention, **options)
        want = run(**arguments)
        with jax.set_mesh(mesh_of(sequence=4)), attention_by(method):
            close(jax.jit(run)(**arguments), want, 1e-5, f"{method}: {name}")


def test_a_row_that_is_not_finite_in_one_piece_leaves_the_other_piece_alone():
    """Keys of a second piece that are NaN, in rows that the loss leaves out: no gradient of the first piece is NaN."""
    first, second = draw(T, T), draw(T, T)
    second["k"] = second["k"].at[:, 30].set(jnp.nan)
    shown = (jnp.arange(T) < 30)[None, :, None, None]

    def loss(first):
        pieces = (
            attention_with_lse(**(arguments | {"q": first["q"]}), causal=True)
            for arguments in (first, second)
        )
        joined = compose(*pieces)
        return jnp.square(jnp.where(shown, joined.output, 0)).sum(), joined

    gradients, joined = jax.grad(loss, has_aux=True)(first)
    assert np.isfinite(joined.output[:, :30]).all()
    assert np.isnan(joined.output[:, 30:]).all()
    assert np.isnan(joined.lse[:, 30:]).all()
    assert all(np.isfinite(gradient).all() for gradient in jax.tree.leaves(gradients))
