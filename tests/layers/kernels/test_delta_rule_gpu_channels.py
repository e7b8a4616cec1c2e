"""The Triton kernels of `delta_rule` and `dplr_delta_rule` with a decay per key channel: interpreted, lowered, and on a GPU.

The interpreter fills memory with NaN beforehand, also the outputs. On a GPU, `poisoned` does.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from layers.kernels import devices, pallas_triton
from layers.kernels.delta_rule import DELTA_RULE, DPLR_DELTA_RULE, cases, gpu
from layers.kernels.delta_rule.gpu import channels
from layers.kernels.segments import Segments
from tests.layers.kernels import test_primitives as shared
from tests.layers.kernels.test_delta_rule_gpu import ids_of
from tests.layers.kernels.test_linear_recurrence_gpu import over_one_device, poisoned

TOLERANCE = shared.TOLERANCE["bfloat16"]
SUITES = {"kda": cases.SUITE, "rwkv7": cases.DPLR_SUITE}
CASES = {
    "kda": next(case for case in cases.SUITE.cases if case.name == "plain"),
    "rwkv7": next(case for case in cases.DPLR_SUITE.cases if case.name == "rwkv7"),
}
TAKEN = [
    (suite, case)
    for suite, found in (("kda", cases.SUITE), ("rwkv7", cases.DPLR_SUITE))
    for case in found.cases
    if suite == "rwkv7" or "channel" in case.name
]
by_rule = pytest.mark.parametrize("rule", SUITES)
by_case = pytest.mark.parametrize("rule, case", TAKEN, ids=[f"{rule}-{case.name}" for rule, case in TAKEN])


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def arguments_of(rng, rule, batch, time, *, groups=1, heads=1, key_dim=64, value_dim=64, strong=0.01):
    """Random arguments in bfloat16 with an initial state; keys of norm 1, and some log-decays of -20."""
    grouped = (batch, time, groups if rule == "kda" else heads, key_dim)
    wide = (batch, time, heads, key_dim)
    decay = np.where(rng.random(wide) < strong, -20.0, -rng.exponential(0.02, wide))
    arguments = {
        "q": rng.standard_normal(grouped),
        "k": unit(rng.standard_normal(grouped)),
        "v": rng.standard_normal((batch, time, heads, value_dim)),
        "initial_state": rng.standard_normal((batch, heads, key_dim, value_dim)),
        "log_decay": decay,
    }
    if rule == "kda":
        return shared.cast(arguments | {"beta": rng.uniform(0.05, 0.95, wide[:3])}, "bfloat16")
    kappa = unit(rng.standard_normal(wide))
    # Otherwise w + b a^T would not contract where the decay is strong.
    removal = {"a": -np.exp(decay) * kappa, "b": rng.uniform(0.0, 1.0, wide) * kappa}
    return shared.cast(arguments | removal, "bfloat16")


def check(rule, arguments, case=None, tolerance=TOLERANCE, **options):
    """Compares outputs and all gradients with the float64 reference; `options` go to the call."""
    case = case or CASES[rule]
    got, want, weights = shared.beside_reference(SUITES[rule], case, "gpu", arguments, **options)
    shared.close(got[0], want[0], tolerance, "outputs")
    shared.close_gradients(got[1], want[1], arguments, want[0], weights, tolerance)
    for name, gradient in got[1].items():
        assert gradient.dtype == arguments[name].dtype
    assert [x.dtype for x in got[0]] == [jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize(
    "rule, sizes, segments",
    [
        ("kda", {"time": 130, "groups": 1, "heads": 2, "key_dim": 40, "value_dim": 24}, True),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in (
                ("kda", {"time": 77}, False),
                ("kda", {"time": 130, "key_dim": 128, "value_dim": 136}, False),
                ("kda", {"time": 5, "key_dim": 6, "value_dim": 130}, False),
                ("rwkv7", {"time": 130, "key_dim": 72, "value_dim": 72}, True),
                ("rwkv7", {"time": 128, "heads": 2}, False),
            )
        ),
    ],
    ids=str,
)
def test_interpreted(rule, sizes, segments):
    """Odd lengths and widths, keys in one and two parts, segments with padding, and heads that share queries and keys."""
    rng = np.random.default_rng(0)
    ids = {"segment_ids": ids_of(rng, 1, sizes["time"])} if segments else {}
    with pallas_triton.interpreted():
        check(rule, arguments_of(rng, rule, 1, **sizes), **ids)


@pytest.mark.slow
@by_case
def test_interpreted_cases(rule, case):
    with pallas_triton.interpreted():
        check(rule, shared.cast(shared.draw(case, 1, 70), "bfloat16"), case)


@pytest.mark.slow
def test_interpreted_strong_writing():
    """Keys at a cosine of 0.8, which are not normalized before, with beta up to 1.95, and nearly no decay."""
    rng = np.random.default_rng(3)
    arguments = arguments_of(rng, "kda", 1, 130, strong=0.0)
    k = 2.0 * unit(rng.standard_normal((1, 1, 1, 64))) + unit(rng.standard_normal(arguments["k"].shape))
    arguments |= {
        "k": jnp.asarray(3.0 * k, jnp.bfloat16),
        "beta": jnp.asarray(rng.uniform(0.05, 1.95, arguments["beta"].shape), jnp.float32),
        "log_decay": 0.01 * arguments["log_decay"],
    }
    with pallas_triton.interpreted():
        # That of beta is 1.6e-2 off in XLA too.
        check("kda", arguments, tolerance=2.5 * TOLERANCE, normalize_qk=True)


@pytest.mark.slow
@by_rule
def test_interpreted_at_the_limits_of_decay(rule):
    """Decays down to -inf, that is a reset of the channel, leave finite numbers, as in XLA."""
    arguments = arguments_of(np.random.default_rng(2), rule, 1, 70, strong=0.3)
    log_decay = arguments["log_decay"]
    arguments["log_decay"] = jnp.where(log_decay < -15.0, -jnp.inf, log_decay)
    function = SUITES[rule].function
    want = function(**arguments, impl="xla")

    def loss(arguments):
        o, final = function(**arguments, impl="gpu")
        return o.astype(jnp.float32).sum() + final.sum(), (o, final)

    with pallas_triton.interpreted():
        gradients, got = jax.jit(jax.grad(loss, has_aux=True))(arguments)
    shared.close(got, want, TOLERANCE, "outputs")
    assert all(bool(jnp.isfinite(x.astype(jnp.float32)).all()) for x in jax.tree.leaves(gradients))


@pytest.mark.slow
@pytest.mark.parametrize("decay", [None, "head"])
def test_interpreted_general_rule_with_other_decays(decay):
    """Without a decay, and with one per head."""
    arguments = arguments_of(np.random.default_rng(5), "rwkv7", 1, 70, strong=0.0)
    log_decay = arguments.pop("log_decay")
    if decay == "head":
        arguments["log_decay"] = log_decay[..., 0]
    # The gradient of one decay for all channels is a sum of terms that cancel.
    with pallas_triton.interpreted():
        check("rwkv7", arguments, tolerance=1.5 * TOLERANCE)


def traced(rule, arguments, segment_ids=None):
    """The program of both passes of the kernels, past the checks of the device."""
    segments = Segments.of(segment_ids)

    def run(arguments):
        if rule == "kda":
            return gpu.delta_rule(**arguments, scale=1.0, normalize_qk=True, segments=segments)
        return gpu.dplr_delta_rule(**arguments, scale=1.0, segments=segments)

    def both(arguments):
        output, pullback = jax.vjp(run, arguments)
        return output, pullback(output)

    return jax.jit(both).trace(arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule, sizes, segments, kernels",
    [
        ("kda", {"groups": 2, "heads": 2, "key_dim": 128, "value_dim": 128}, True, 6),
        ("kda", {"groups": 1, "heads": 4, "key_dim": 96, "value_dim": 192}, False, 6),
        ("rwkv7", {"heads": 2}, True, 10),
        ("rwkv7", {"heads": 2, "key_dim": 128, "value_dim": 256}, False, 10),
    ],
    ids=str,
)
def test_lowers_for_a_gpu(rule, sizes, segments, kernels):
    make = functools.partial(arguments_of, np.random.default_rng(0), rule, 9, 1111, **sizes)
    arguments = jax.eval_shape(make)
    with jax.sharding.use_abstract_mesh(pallas_triton.hopper_mesh()):
        program = traced(rule, arguments, jnp.ones((9, 1111), jnp.int32) if segments else None)
        text = program.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton") == kernels


@pytest.mark.slow
def test_probe_lowers():
    channels.probe()


@pytest.mark.slow
@by_rule
def test_explicit_mesh(rule):
    """Rows and heads are shared out as those of v are."""
    mesh = pallas_triton.hopper_mesh(data=4, model=2)

    def sharded(x):
        spec = P("data", "model") if x.shape[1] == 8 else P("data", None, "model")
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    make = functools.partial(arguments_of, np.random.default_rng(0), rule, 8, 24, groups=8, heads=8)
    arguments = jax.tree.map(sharded, jax.eval_shape(make))
    with jax.sharding.use_abstract_mesh(mesh):
        program = traced(rule, arguments)
        assert "tensor<2x24x4x64xbf16>" in program.lower(lowering_platforms=("cuda",)).as_text()
        (o, final), gradients = program.out_info
    assert o.sharding.spec == P("data", None, "model", None)
    assert final.sharding.spec == P("data", "model", None, None)
    assert all(gradients[0][name].sharding.spec[0] == "data" for name in arguments)


@by_rule
def test_refusals(rule):
    """The reason is given when asked for by name; by default XLA computes short calls, and those with few heads."""
    arguments = arguments_of(np.random.default_rng(4), rule, 1, 5, heads=2, key_dim=4, value_dim=4)
    many = arguments_of(np.random.default_rng(4), rule, 2**15, 1, heads=2, key_dim=2, value_dim=2)
    wide = arguments_of(np.random.default_rng(4), rule, 1, 2, key_dim=130, value_dim=2)
    for given, reason in (
        (many, "v has 65536 rows times heads; expected at most 65535"),
        (wide, "k has 130 features a head; expected at most 128"),
        (arguments | {"k": arguments["k"].astype(jnp.float32)}, "k has dtype float32; expected bfloat16"),
        (arguments, "needs a Hopper GPU; JAX computes on cpu"),
    ):
        with pytest.raises(ValueError, match=f"impl='gpu' .* {reason}"):
            SUITES[rule].function(**given, impl="gpu")
    with devices.as_on("gpu"):
        implementation = {"kda": DELTA_RULE, "rwkv7": DPLR_DELTA_RULE}[rule]["gpu"]
        assert "timed from 2048 on" in implementation.passed_over_reason(**arguments)
        long = jax.eval_shape(lambda: arguments_of(np.random.default_rng(4), rule, 4, 2048, heads=8))
        assert implementation.passed_over_reason(**long) is None
        few = jax.eval_shape(lambda: arguments_of(np.random.default_rng(4), rule, 1, 2048, heads=8))
        assert "batch x heads is 8; from 32 on" in implementation.passed_over_reason(**few)


@pytest.mark.gpu
@by_case
@pytest.mark.parametrize("time", [1, 2, 37, 130, 1000])
@pytest.mark.parametrize("segments", [False, True], ids=["whole", "segments"])
def test_shared_cases_on_gpu(rule, case, time, segments):
    poisoned(2**26)
    rng = np.random.default_rng()
    arguments = shared.cast(shared.draw(case, 2, time, seed=int(rng.integers(2**31))), "bfloat16")
    ids = {"segment_ids": ids_of(rng, 2, time)} if segments else {}
    # A gradient of one or two tokens may be one number that is left of terms that cancel.
    check(rule, arguments, case, 1.5 * TOLERANCE if time > 2 else 5 * TOLERANCE, **ids)


SHAPES = {
    "128": {"batch": 3, "time": 1000, "groups": 4, "heads": 4, "key_dim": 128, "value_dim": 128},
    "64": {"batch": 3, "time": 517, "groups": 4, "heads": 4},
    "grouped": {"batch": 2, "time": 777, "groups": 1, "heads": 4, "key_dim": 128, "value_dim": 64},
    "wide values": {"batch": 2, "time": 400, "groups": 2, "heads": 2, "key_dim": 96, "value_dim": 192},
    "odd widths": {"batch": 2, "time": 129, "groups": 3, "heads": 3, "key_dim": 96, "value_dim": 40},
    "whole chunks": {"batch": 1, "time": 512, "groups": 2, "heads": 2, "key_dim": 128, "value_dim": 128},
    "many heads": {"batch": 2, "time": 2100, "groups": 16, "heads": 16},
    "one row": {"batch": 1, "time": 8200, "groups": 2, "heads": 2, "key_dim": 128, "value_dim": 128},
}


@pytest.mark.gpu
@by_rule
@pytest.mark.parametrize("segments", [False, True], ids=["whole", "segments"])
@pytest.mark.parametrize("shape", SHAPES)
def test_on_gpu(rule, shape, segments):
    """Fresh random inputs over memory that was filled with NaN."""
    rng = np.random.default_rng()
    sizes = SHAPES[shape]
    poisoned(2**26)
    options = {"segment_ids": ids_of(rng, sizes["batch"], sizes["time"], 0.01)} if segments else {}
    check(rule, arguments_of(rng, rule, **sizes), **options)


@pytest.mark.gpu
@by_rule
def test_repeats_exactly_on_gpu(rule):
    """A hundred calls give the same numbers: no kernel depends on the order in which programs run."""
    sizes = {"groups": 16, "heads": 16, "key_dim": 128, "value_dim": 128}
    arguments = arguments_of(np.random.default_rng(), rule, 8, 1024, **sizes)

    @jax.jit
    def run(arguments):
        def loss(arguments):
            o, final = SUITES[rule].function(**arguments, impl="gpu")
            return o.astype(jnp.float32).sum() + final.sum(), (o, final)

        return jax.value_and_grad(loss, has_aux=True)(arguments)

    first = run(arguments)
    for _ in range(100):
        again = run(arguments)
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), first, again)))


@pytest.mark.gpu
@by_rule
def test_transformations_on_gpu(rule):
    arguments = arguments_of(np.random.default_rng(), rule, 8, 90, groups=2, heads=2)

    def run(arguments):
        return SUITES[rule].function(**arguments, impl="gpu")

    def loss(arguments):
        return sum(x.astype(jnp.float32).sum() for x in run(arguments))

    def merge(tree):
        return jax.tree.map(lambda x: x.reshape(8, *x.shape[2:]), tree)

    split = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), arguments)
    for name, function in (("outputs", run), ("gradients", jax.grad(loss))):
        want = jax.tree.map(np.asarray, function(arguments))
        for transform, got in {
            "jit": jax.jit(function)(arguments),
            "checkpoint": jax.checkpoint(function)(arguments),
            "vmap": merge(jax.vmap(function)(split)),
            "scan": merge(jax.lax.map(function, split)),
            "shard_map": over_one_device(function)(arguments),
        }.items():
            shared.close(got, want, 1e-3, f"{name} under {transform}")
