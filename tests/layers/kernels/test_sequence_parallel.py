"""Primitives with their time divided over devices: outputs, states and gradients are those of one device."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from experiments.benchmark.collectives import bytes_sent
from layers.kernels import all_scan, kept
from layers.kernels.attention import Logits, Mask, attention, attention_with_lse, ring, score_ring
from layers.kernels.attention.options import Options, Places
from layers.kernels.attention.visits import Arrays
from layers.kernels.delta_rule import delta_rule, dplr_delta_rule
from layers.kernels.gated_linear_attention import gated_linear_attention
from layers.kernels.linear_recurrence import Piece, compose, linear_recurrence
from layers.kernels.long_conv import long_conv
from layers.kernels.segments import Segments
from layers.kernels.selective_scan import selective_scan
from layers.kernels.sequence_parallel import attention_by, states_by
from layers.kernels.short_conv import short_conv

TIME = 32
AXES = "data", "fsdp", "tensor", "sequence", "expert"
EIGHT = {"sequence": 8}
CUBE = {"data": 2, "tensor": 2, "sequence": 2}
# Segments that end inside a part, at a cut and after whole parts; a segment of one token; padding from inside a part on.
AT_END = np.repeat([[1, 2, 3, 4, 0], [5, 5, 6, 7, 0]], [11, 5, 1, 10, 5], axis=1)
# Padding in front, over a whole part and between the tokens of one segment, and an id that comes back.
ANYWHERE = np.repeat([[0, 1, 0, 1, 2, 1], [3, 0, 3, 4, 4, 0]], [6, 5, 9, 4, 5, 3], axis=1)


def mesh_of(**sizes):
    shape = tuple(sizes.get(name, 1) for name in AXES)
    count = int(np.prod(shape))
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=jax.devices()[:count])


def normal(rng, *shape):
    return rng.standard_normal(shape)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def recurrence(rng, state):
    given = {"a": rng.uniform(0.5, 1, (2, TIME, 4)), "x": normal(rng, 2, TIME, 4)}
    return linear_recurrence, given | ({"initial_state": normal(rng, 2, 4)} if state else {})


def fixed_recurrence(rng, state):
    """A time-invariant complex system that runs from the last step to the first."""
    given = {
        "a": rng.uniform(0.5, 0.9, (1, 1, 4)) * np.exp(1j * normal(rng, 1, 1, 4)),
        "x": normal(rng, 2, TIME, 4),
    }
    given |= {"initial_state": normal(rng, 2, 4)} if state else {}
    return functools.partial(linear_recurrence, reverse=True), given


def scan(rng, state):
    given = {name: normal(rng, 2, TIME, 4) for name in ("x", "dt", "gate")}
    given |= {"a": -rng.uniform(0.1, 1, (4, 3)), "skip": normal(rng, 4), "dt_bias": normal(rng, 4)}
    given |= {name: normal(rng, 2, TIME, 1, 3) for name in "bc"}
    given |= {"initial_state": normal(rng, 2, 4, 3)} if state else {}
    return functools.partial(selective_scan, dt_softplus=True), given


def linear_attention(rng, state):
    """A decay per channel, fewer heads of keys than of queries, and a bonus."""
    given = {
        "q": normal(rng, 2, TIME, 4, 3),
        "k": normal(rng, 2, TIME, 2, 3),
        "v": normal(rng, 2, TIME, 4, 5),
    }
    given |= {"log_decay": -rng.exponential(0.3, (2, TIME, 4, 3)), "bonus": normal(rng, 4, 3)}
    return gated_linear_attention, given | ({"initial_state": normal(rng, 2, 4, 3, 5)} if state else {})


def normalized_linear_attention(rng, state):
    """A fixed decay per head, one head of keys and values, and the sum of weights in the state."""
    given = {"q": rng.uniform(0.1, 1, (2, TIME, 2, 3)), "k": rng.uniform(0.1, 1, (2, TIME, 1, 3))}
    given |= {"v": normal(rng, 2, TIME, 1, 4), "log_decay": -rng.exponential(0.3, 2)}
    given |= {"initial_state": rng.uniform(0.1, 1, (2, 2, 3, 5))} if state else {}
    return functools.partial(gated_linear_attention, normalize=True), given


def delta(rng, state):
    given = {name: normal(rng, 2, TIME, 2, 3) for name in "qk"} | {"v": normal(rng, 2, TIME, 4, 5)}
    given |= {"beta": rng.uniform(0.1, 0.9, (2, TIME, 4)), "log_decay": -rng.exponential(0.3, (2, TIME, 4))}
    given |= {"initial_state": normal(rng, 2, 4, 3, 5)} if state else {}
    return functools.partial(delta_rule, normalize_qk=True), given


def low_rank_delta(rng, state):
    removal = unit(normal(rng, 2, TIME, 2, 3))
    given = {name: normal(rng, 2, TIME, 2, 3) for name in "qk"} | {"v": normal(rng, 2, TIME, 2, 5)}
    given |= {"a": -removal, "b": 0.5 * removal, "log_decay": -rng.exponential(0.3, (2, TIME, 2, 3))}
    return dplr_delta_rule, given | ({"initial_state": normal(rng, 2, 2, 3, 5)} if state else {})


def convolution(rng, state):
    given = {"x": normal(rng, 2, TIME, 4), "weight": normal(rng, 4, 4), "bias": normal(rng, 4)}
    given |= {"initial_state": normal(rng, 2, 3, 4)} if state else {}
    return functools.partial(short_conv, activation="silu"), given


def wide_convolution(rng, state):
    """A part of eight holds 4 tokens, fewer than the 7 that the convolution reaches back."""
    given = {"x": normal(rng, 2, TIME, 4), "weight": normal(rng, 8, 4)}
    return short_conv, given | ({"initial_state": normal(rng, 2, 7, 4)} if state else {})


def gated_long_convolution(rng, state):
    """As in Hyena, with both gates, a term of the input itself, and past inputs."""
    given = {name: normal(rng, 2, TIME, 8) for name in ("x", "input_gate", "output_gate")}
    given |= {"kernel": normal(rng, 8, 12), "skip": normal(rng, 8)}
    given |= {"initial_state": normal(rng, 2, 11, 8)} if state else {}

    def function(segment_ids=None, **given):
        del segment_ids
        return long_conv(**given)

    return function, given


def softmax_attention(rng, state):
    """Causal, with grouped heads, a window with sink tokens, slopes and sink logits."""
    del state
    given = {
        "q": normal(rng, 2, TIME, 4, 3),
        "k": normal(rng, 2, TIME, 2, 3),
        "v": normal(rng, 2, TIME, 2, 5),
    }
    given |= {"slopes": rng.uniform(0.1, 1, 4), "sink_logits": normal(rng, 4)}

    def function(slopes, sink_logits, **given):
        logits = Logits(slopes=slopes, sink_logits=sink_logits, logit_cap=3.0)
        return attention(**given, causal=True, mask=Mask(window=9, sink_tokens=2), logits=logits)

    return function, given


def attention_both_ways(rng, state):
    """Every key is seen, with a bias by head and place, and the log-sum-exp is returned."""
    del state
    given = {name: normal(rng, 2, TIME, 2, 4) for name in "qkv"} | {"bias": normal(rng, 1, 2, TIME, TIME)}

    def function(bias, **given):
        piece = attention_with_lse(**given, logits=Logits(bias=bias))
        return piece.output, jnp.where(jnp.isfinite(piece.lse), piece.lse, 0)

    return function, given


def attention_with_prefix(rng, state):
    del state
    given = {name: normal(rng, 2, TIME, 4, 4) for name in "qkv"}
    mask = Mask(prefix_lengths=jnp.asarray([3, 12]))
    return functools.partial(attention, causal=True, mask=mask), given


def attention_in_a_window(rng, state):
    """Causal, in a window that reaches over two parts of eight, which are sent no further."""
    del state
    given = {
        "q": normal(rng, 2, TIME, 4, 3),
        "k": normal(rng, 2, TIME, 2, 3),
        "v": normal(rng, 2, TIME, 2, 5),
    }
    return functools.partial(attention, causal=True, mask=Mask(window=7)), given


def attention_of_lists(rng, state):
    """Causal, with a list of blocks for each head and sink tokens, and a bias by head and place."""
    del state
    lists = rng.integers(0, 8, (1, 4, 8, 3))
    mask = Mask(block_indices=jnp.asarray(lists), block_size=4, sink_tokens=1)
    given = {name: normal(rng, 2, TIME, 4, 3) for name in "qkv"} | {"bias": normal(rng, 1, 4, TIME, TIME)}

    def function(bias, **given):
        return attention(**given, causal=True, mask=mask, logits=Logits(bias=bias))

    return function, given


CALLS = {
    one.__name__: one
    for one in (
        recurrence,
        fixed_recurrence,
        scan,
        linear_attention,
        normalized_linear_attention,
        delta,
        low_rank_delta,
        convolution,
        wide_convolution,
        softmax_attention,
        attention_both_ways,
        attention_with_prefix,
    )
}
OTHERS = {one.__name__: one for one in (gated_long_convolution, attention_in_a_window, attention_of_lists)}
BY_DEFAULT = "recurrence", "scan", "linear_attention", "delta", "convolution", "softmax_attention"
ROWS = {
    "whole": None,
    "at_end": (AT_END, {"padding": "end"}),
    "anywhere": (ANYWHERE, {}),
    "one_segment": ((AT_END != 0).astype(int), {"padding": "end", "packed": False}),
}


def heads_of(rng, heads, groups):
    q, k, v = normal(rng, 2, TIME, heads, 3), normal(rng, 2, TIME, groups, 3), normal(rng, 2, TIME, groups, 5)
    return {"q": q, "k": k, "v": v}


def exchanged_attention(rng, state):
    """Causal, with grouped heads, a window with sink tokens, slopes and sink logits."""
    del state
    function, given = softmax_attention(rng, False)
    return function, heads_of(rng, 8, 4) | {
        name: np.tile(given[name], 2) for name in ("slopes", "sink_logits")
    }


def exchanged_attention_both_ways(rng, state):
    """With a bias by head and place and the log-sum-exp."""
    function, given = attention_both_ways(rng, state)
    return function, heads_of(rng, 4, 4) | {"bias": np.tile(given["bias"], (1, 2, 1, 1))}


def exchanged_attention_of_lists(rng, state):
    """A list of blocks for each head."""
    del state
    lists = rng.integers(0, 8, (1, 4, 8, 3))
    function = functools.partial(attention, mask=Mask(block_indices=jnp.asarray(lists), block_size=4))
    return function, heads_of(rng, 4, 4)


def exchanged_attention_of_few_heads(rng, state):
    """One head of keys and values for the queries of all devices."""
    del state
    return functools.partial(attention, causal=True), heads_of(rng, 4, 1)


EXCHANGED = {
    one.__name__: one
    for one in (
        exchanged_attention,
        exchanged_attention_both_ways,
        exchanged_attention_of_lists,
        exchanged_attention_of_few_heads,
    )
}


def call(name, rows, state):
    """The function of arrays that gives outputs, the final state and all gradients, and its arguments."""
    every = CALLS | EXCHANGED | OTHERS
    rng = np.random.default_rng(sorted(every).index(name))
    function, given = every[name](rng, state)
    given = {
        key: jnp.asarray(value, jnp.complex64 if np.iscomplexobj(value) else jnp.float32)
        for key, value in given.items()
    }
    segments = (
        None if ROWS[rows] is None else Segments.of(jnp.asarray(ROWS[rows][0], jnp.int32), **ROWS[rows][1])
    )
    results = jax.eval_shape(lambda given: function(**given), given)
    weights = jax.tree.map(lambda x: jnp.asarray(normal(rng, *x.shape), jnp.float32), results)

    def loss(given, segments):
        outputs = function(**given, segment_ids=segments)
        sums = jax.tree.map(
            lambda w, x: (w * (x.real + x.imag if jnp.iscomplexobj(x) else x)).sum(), weights, outputs
        )
        return sum(jax.tree.leaves(sums)), outputs

    return jax.jit(jax.grad(loss, has_aux=True)), (given, segments)


def compare(got, want, tolerance=2e-5):
    for (path, one), other in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        error = np.abs(one - other).max() / max(1, np.abs(other).max())
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: difference {error:.1e}"


@functools.cache
def alone(name, rows, state):
    function, arguments = call(name, rows, state)
    return jax.device_get(function(*arguments))


def check(name, rows, state, sizes):
    """Compares with one device, and returns the text of the program that ran on the mesh."""
    function, arguments = call(name, rows, state)
    with jax.set_mesh(mesh_of(**sizes)):
        compiled = function.lower(*arguments).compile()
        got = jax.device_get(compiled(*arguments))
    compare(got, alone(name, rows, state))
    return compiled.as_text()


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in BY_DEFAULT)) for name in CALLS]
)
def test_packed_rows_that_cross_the_cuts(name):
    check(name, "at_end", True, EIGHT)


@pytest.mark.parametrize(
    "name, rows, sizes",
    [
        pytest.param(
            name, rows, sizes, marks=[pytest.mark.slow] * (call != ("exchanged_attention", "at_end", CUBE))
        )
        for name in EXCHANGED
        for rows in ("whole", "at_end", "anywhere")
        for sizes in ({"data": 2, "sequence": 4}, CUBE)
        for call in [(name, rows, sizes)]
    ],
)
def test_attention_exchanges_time_for_heads(name, rows, sizes):
    with attention_by("ulysses"):
        check(name, rows, False, sizes)


def test_heads_that_cannot_be_exchanged_are_named():
    function, arguments = call("softmax_attention", "whole", False)
    with (
        jax.set_mesh(mesh_of(tensor=2, sequence=4)),
        attention_by("ulysses"),
        pytest.raises(
            ValueError,
            match=r"q has 4 heads, .* 4 devices \(sequence\) times 2 \(tensor\); use a multiple of 8, or method='ring'",
        ),
    ):
        function(*arguments)
    with pytest.raises(ValueError, match="method='star'; expected 'all_gather', .* or 'partitioned'"):
        attention_by("star").__enter__()


def test_a_long_convolution_exchanges_time_for_channels():
    text = check("gated_long_convolution", "whole", True, {"tensor": 2, "sequence": 4})
    assert " all-to-all(" in text


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("recurrence", EIGHT),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("linear_attention", EIGHT),
                ("fixed_recurrence", EIGHT),
                ("delta", EIGHT),
                ("scan", CUBE),
                ("normalized_linear_attention", CUBE),
            )
        ),
    ],
)
def test_states_flow_from_device_to_device(name, sizes):
    with states_by("all_scan"):
        text = check(name, "at_end", True, sizes)
    # Blocks of one number per row over eight devices, forward and backward; nothing is gathered.
    block, count = {"recurrence": ("f32[2,1]", 4), "linear_attention": ("f32[2,4,3,1]", 5)}.get(
        name, (None, 0)
    )
    if block is not None:
        found = collectives(text)
        assert found[block, "collective-permute"] == 2 * (count + 8 - 2)
        assert not any(kind == "all-gather" for _, kind in found)


def collectives(text):
    """Kinds of the collective operations of a compiled program, and the shapes of what they make."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    return collections.Counter(re.findall(rf"= (\w+\[[\d,]*\])\S* ({kinds})(?:-start)?\(", text))


def test_what_crosses_the_cuts_does_not_depend_on_the_length():
    """One gather of decays and states, of which nothing has the size of time; back, the sums of their gradients."""
    rng = np.random.default_rng(0)
    function, given = linear_attention(rng, False)
    given = {key: jnp.asarray(value, jnp.float32) for key, value in given.items()}
    mesh = mesh_of(**EIGHT)
    whole, cut = (jax.NamedSharding(mesh, spec) for spec in (P(), P(None, "sequence")))
    with jax.set_mesh(mesh):
        given = {key: jax.device_put(x, whole if key == "bonus" else cut) for key, x in given.items()}
        loss = jax.grad(lambda given: jnp.square(function(**given)[0]).sum())
        found = collectives(jax.jit(loss).lower(given).compile().as_text())
    assert found == {
        ("f32[8,2,4,3,1]", "all-gather"): 1,
        ("f32[8,2,4,3,5]", "all-gather"): 1,
        ("f32[1,2,4,3,1]", "reduce-scatter"): 1,
        ("f32[1,2,4,3,5]", "reduce-scatter"): 1,
        ("f32[4,3]", "all-reduce"): 1,  # the gradient of the bonus, which all devices hold
    }


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [EIGHT, CUBE], ids=["eight", "cube"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", CALLS)
def test_all_kinds_of_rows(name, rows, sizes):
    check(name, rows, rows != "whole", sizes)


FOUR = {"sequence": 4}
VISITS = "ring", "zigzag", "token_ring", "score_ring"
# A part of keys, of values and of queries, and of the output and the two parts of its log-sum-exp, in the default tests.
K, V, Q, OUTPUT, LSE = "f32[2,8,2,3]", "f32[2,8,2,5]", "f32[2,8,4,3]", "f32[2,8,4,5]", "f32[2,8,4]"
HALVES = {whole: whole.replace("[2,8,", "[2,4,") for whole in (K, V, Q, OUTPUT, LSE)}
# Keys and values go forward three times, in one ring or in two, and backward with their gradients, which come home. In zig-zag order each half of
# everything is exchanged, and so are outputs and all gradients. Queries go three times forward and three times backward, and
# what is found for them returns; backward the gradient of the output and three numbers per query travel with them.
SENT = {
    "ring": {K: 10, V: 10},
    "score_ring": {K: 10, V: 10},
    "zigzag": {K: 10, V: 10} | {HALVES[K]: 4, HALVES[V]: 4, HALVES[Q]: 4, HALVES[OUTPUT]: 4},
    "token_ring": {Q: 9, OUTPUT: 6, LSE: 15} | {HALVES[K]: 4, HALVES[V]: 4, HALVES[Q]: 4, HALVES[OUTPUT]: 4},
}


@pytest.mark.parametrize("method", VISITS)
def test_attention_by_visits(method):
    """Packed rows that cross the cuts, and what the compiled program sends."""
    with attention_by(method):
        text = check("softmax_attention", "at_end", False, FOUR)
    found = collectives(text)
    sent = {
        shape: n for (shape, kind), n in found.items() if kind == "collective-permute" and "s32" not in shape
    }
    assert sent == SENT[method]
    # Whole rows of scores: four parts of keys, and two queries for each of two heads of keys.
    assert ("f32[4,2,2,2,8,8]" in text) == (method == "score_ring")


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.slow] * (name != "score_ring")) for name in VISITS]
)
def test_a_number_that_is_not_finite_reaches_only_those_who_see_it(method):
    """In packed rows: a value in one segment, a key in another and a query in a third."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, TIME, 2, 4)).astype(np.float32)
    v[0, 3, 0, 1] = k[0, 13, 1, 2] = q[1, 8, 0, 0] = np.nan
    q, k, v = map(jnp.asarray, (q, k, v))
    segments = Segments.of(jnp.asarray(AT_END, jnp.int32), padding="end")
    want = attention(q, k, v, causal=True, segment_ids=segments, impl="reference")
    with jax.set_mesh(mesh_of(**FOUR)), attention_by(method):
        got = jax.jit(functools.partial(attention, causal=True))(q, k, v, segment_ids=segments)
    assert 0 < np.isnan(want).sum() < want.size / 4
    np.testing.assert_allclose(got, want, atol=2e-5)  # NaN where the reference has NaN


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, name, rows, sizes",
    [
        *((method, "attention_both_ways", "anywhere", {"data": 2, "sequence": 4}) for method in VISITS),
        *((method, "attention_in_a_window", "at_end", EIGHT) for method in VISITS),
        *((method, "attention_of_lists", "anywhere", CUBE) for method in VISITS),
        ("zigzag", "attention_with_prefix", "whole", FOUR),
    ],
)
def test_attention_by_visits_of_all_kinds(method, name, rows, sizes):
    with attention_by(method):
        check(name, rows, False, sizes)


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "ring")) for name in (*VISITS, "ulysses")],
)
def test_a_layer_that_is_recomputed_keeps_the_results_of_attention(method):
    """What visits is not sent again, which it is if nothing is kept; only exchanges of order, or of time for heads, are."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, TIME, 4, 4)), jnp.float32)

    def layer(x):
        return jnp.tanh(attention(jnp.sin(x), jnp.cos(x), x, causal=True))

    def sent(run):
        with jax.set_mesh(mesh_of(**FOUR)), attention_by(method):
            cut = jax.NamedSharding(mesh_of(**FOUR), P(None, "sequence"))
            grad = jax.jit(jax.grad(lambda x: jnp.square(run(x)).sum()), in_shardings=cut, out_shardings=cut)
            compiled = grad.lower(x).compile()
            return bytes_sent(compiled.as_text()).total(), compiled(x)

    without, gradient = sent(layer)
    keeping, again = sent(jax.checkpoint(layer, policy=kept.policy))
    computing, _ = sent(jax.checkpoint(layer, policy=jax.checkpoint_policies.nothing_saveable))
    np.testing.assert_allclose(again, gradient, atol=2e-5)
    part = x.nbytes // 4
    exchanged = {"ulysses": 4 * part * 3 // 4, "zigzag": 4 * part, "token_ring": 4 * part}.get(method, 0)
    assert keeping - without == exchanged
    assert method == "ulysses" or computing > keeping


MANY = 10  # devices; more than a ring runs without a loop


def parts(x, count=MANY):
    """The parts of time (b, t, ...) that devices hold, (count, b, t / count, ...)."""
    return jnp.moveaxis(x.reshape(x.shape[0], count, -1, *x.shape[2:]), 1, 0)


def on_many(function, *arrays):
    """`function` on every device's part, all on one device: what they exchange is the axis of a map."""
    results = jax.vmap(function, axis_name="sequence")(*map(parts, arrays))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]), results)


@pytest.mark.parametrize(
    "module, order",
    [(ring, "contiguous"), (ring, "zigzag"), (score_ring, "contiguous")],
    ids=["ring", "zigzag", "score_ring"],
)
def test_many_hops_are_a_loop(module, order):
    """Ten devices, packed rows with padding, a window with sink tokens: outputs and gradients of one device."""
    assert MANY - 1 > ring.MOST_UNROLLED
    rng = np.random.default_rng(0)
    q, k, v, weights = (jnp.asarray(normal(rng, 2, 40, h, 4), jnp.float32) for h in (4, 2, 2, 4))
    segments = Segments.of(jnp.asarray(np.repeat([[1, 2, 0], [3, 3, 4]], [17, 14, 9], axis=1), jnp.int32))
    mask = Mask(window=21, sink_tokens=2)
    plan = ring.Plan(Options(causal=True, mask=mask), order, MANY - 1)

    def local(q, k, v, weights, positions, ids):
        def output(q, k, v):
            places = Places(positions, positions, ids, ids)
            if order == "zigzag":
                q, k, v, places = jax.tree.map(ring.to_zigzag, (q, k, v, places))
            found = module.attend(plan, q, k, v, Arrays(), places).output
            return ring.from_zigzag(found) if order == "zigzag" else found

        found, pull = jax.vjp(output, q, k, v)
        return found, pull(weights)

    got = jax.jit(functools.partial(on_many, local))(q, k, v, weights, segments.positions, segments.ids)
    alone = functools.partial(attention, causal=True, mask=mask, segment_ids=segments)
    want, pull = jax.vjp(alone, q, k, v)
    compare(got, (want, pull(weights)))


def permuted_on_one_device(permute):
    """`jax.lax.ppermute` for a map, which takes permutations only: devices to which nobody sends receive zeros."""

    def run(x, axis, pairs):
        senders, receivers = ([pair[side] for pair in pairs] for side in (0, 1))
        everyone = range(jax.lax.axis_size(axis))
        rest = zip(sorted(set(everyone) - set(senders)), sorted(set(everyone) - set(receivers)), strict=True)
        received = jnp.isin(jax.lax.axis_index(axis), jnp.asarray(receivers))
        return jnp.where(received, permute(x, axis, [*pairs, *rest]), 0)

    return run


@pytest.mark.parametrize("reverse", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_many_rounds_of_states_are_a_loop(reverse, monkeypatch):
    """Ten devices, whose states are cut into nine blocks: h = a h + x from device to device, and where one forgets."""
    assert 9 + MANY - 2 > all_scan.MOST_UNROLLED
    monkeypatch.setattr(jax.lax, "ppermute", permuted_on_one_device(jax.lax.ppermute))
    rng = np.random.default_rng(0)
    a, x, initial = rng.uniform(0.5, 1, (MANY, 2, 9)), normal(rng, MANY, 2, 9), normal(rng, 2, 9)
    forgets = rng.random((MANY, 2)) < 0.2
    want, state = np.empty_like(x), initial
    for n in reversed(range(MANY)) if reverse else range(MANY):
        want[n] = state
        state = np.where(forgets[n][:, None], 0, a[n] * state) + x[n]

    def local(a, x, forgets):
        start = jnp.asarray(initial, jnp.float32)
        return all_scan.all_scan(Piece(a, x), compose, start, forgets, elementwise=True, reverse=reverse)

    run = jax.jit(jax.vmap(local, axis_name="sequence"))
    got = run(jnp.asarray(a, jnp.float32), jnp.asarray(x, jnp.float32), jnp.asarray(forgets))
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("method", ["ring", pytest.param("score_ring", marks=pytest.mark.slow)])
def test_a_loop_sends_what_its_hops_send(method, monkeypatch):
    """The compiled programs of eight devices, of which none runs here: a loop of XLA's CPU client may hang."""
    q = jnp.ones((1, TIME, 2, 4))
    loss = jax.grad(lambda q, k, v: jnp.square(attention(q, k, v, causal=True)).sum(), argnums=(0, 1, 2))

    def sent(most):
        monkeypatch.setattr(ring, "MOST_UNROLLED", most)
        with jax.set_mesh(mesh_of(**EIGHT)), attention_by(method):
            text = jax.jit(lambda *given: loss(*given)).lower(q, q, q).compile().as_text()
        return bytes_sent(text), text.count(" while(")

    (unrolled, without), (looped, loops) = sent(8), sent(2)
    assert looped["collective-permute"] == unrolled["collective-permute"] > 0
    assert loops > without


def test_zigzag_order_deals_out_causal_work():
    """Every device sees equally many keys in every step after its own; in order, the last sees all and the first none."""

    def places(order):
        with jax.set_mesh(mesh_of(**EIGHT)):
            parts = P("sequence")
            held = jax.shard_map(
                lambda _: ring.indices(order, ring.device(), 4)[None], in_specs=parts, out_specs=parts
            )
            return np.asarray(held(jnp.zeros(8)))

    seen = {}
    for order in ("contiguous", "zigzag"):
        held = places(order)
        assert sorted(held.ravel()) == list(range(TIME))
        pairs = held[:, None, :, None] >= held[None, :, None, :]
        seen[order] = pairs.sum((2, 3))[~np.eye(8, dtype=bool)].reshape(8, 7)
    assert (seen["zigzag"] == 8).all()
    assert set(seen["contiguous"].ravel()) == {0, 16}


def test_a_length_that_zigzag_order_does_not_divide_is_named():
    q = jnp.ones((1, 12, 2, 2))
    with (
        jax.set_mesh(mesh_of(**FOUR)),
        attention_by("zigzag"),
        pytest.raises(ValueError, match="12 tokens .* 8 pieces, .*; use 8 or 16, or method='ring'"),
    ):
        attention(q, q, q, causal=True)


def test_an_implementation_that_takes_whole_rows_is_refused_in_a_ring():
    q = jnp.ones((1, 8, 2, 2))
    with (
        jax.set_mesh(mesh_of(**FOUR)),
        attention_by("ring"),
        pytest.raises(ValueError, match="impl='reference' of attention takes whole rows .* method='ring'"),
    ):
        attention(q, q, q, causal=True, impl="reference")
