"""Forward-mode differentiation and sizes that are symbols: they work, or an error says what does."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from jax import export

from layers.kernels import dispatch
from layers.segments import Segments
from tests.layers.mixers.test_contract import BATCH, TIME, WIDTH, build, every_mixer, inputs

# Mixers that need the length as a number; any length of one exported function serves the others.
NEED_A_LENGTH = {
    *("s4", "s4d", "dss", "gss", "h3", "liquid_s4", "sgconv", "hyena", "mega"),
    *("rwkv4", "mlstm", "xlstm7b", "linformer"),
    *("longformer", "bigbird", "longt5", "etc", "nystromformer", "luna-carried", "reformer", "informer"),
    *("moba", "dsa", "sparse_mla", "landmark", "softplus_attention", "transformer_xl"),
    *("cross_scan", "vmamba", "msvmamba", "s4nd", "path_attention", "nsa"),
    *("power_attention", "strided_attention", "core_context"),
}


@pytest.fixture(autouse=True)
def unchecked_annotations():
    """Symbols are no `int`, which annotations of private helpers ask for."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def shape_of(entry, *sizes):
    graph, variables = nnx.split(build(entry))

    def run(variables, x):
        return nnx.merge(graph, variables, copy=True)(x)[0]

    return jax.eval_shape(run, variables, jax.ShapeDtypeStruct((*sizes, WIDTH), jnp.float32)).shape


@pytest.mark.slow
@every_mixer
def test_sizes_may_be_symbols(entry):
    batch, time = export.symbolic_shape("b, t")
    assert shape_of(entry, batch, TIME) == (batch, TIME, WIDTH)
    if {entry, entry.split("-")[0]} & NEED_A_LENGTH:
        with pytest.raises(ValueError, match="export .* with a number in place of t"):
            shape_of(entry, batch, time)
    else:
        assert shape_of(entry, batch, time) == (batch, time, WIDTH)


def test_a_length_that_must_be_a_number_is_named():
    batch, time = export.symbolic_shape("b, t")
    with pytest.raises(
        ValueError, match=r"x of S4 has shape \(b, t, 8\).*export S4 with a number in place of t"
    ):
        shape_of("s4", batch, time)
    assert shape_of("s4", batch, TIME) == (batch, TIME, WIDTH)


@pytest.mark.parametrize("entry", ["hypermixer", "sgconv"])
def test_forward_mode_over_packed_rows_is_refused_by_name(entry):
    ids = jnp.ones((BATCH, TIME), jnp.int32)
    graph, variables = nnx.split(build(entry))

    def derivative(variables, x, ids):
        model = nnx.merge(graph, variables, copy=True)
        return jax.jvp(lambda x: model(x, segment_ids=ids)[0], (x,), (x,))

    with pytest.raises(TypeError, match="packed rows run in a loop over their segments"):
        jax.jit(derivative).lower(variables, inputs(), ids)
    if entry == "hypermixer":
        whole = Segments.of(ids, padding="end", packed=False)
        jax.jit(derivative).lower(variables, inputs(), whole)


@pytest.mark.parametrize("entry", ["mamba3", pytest.param("gated_deltaproduct", marks=pytest.mark.slow)])
@pytest.mark.parametrize("transform", [jax.jacfwd, jax.hessian])
def test_batched_tangents_are_refused_in_our_words_too(entry, transform):
    model = build(entry)
    words = r"no forward-mode differentiation .*with layers\.kernels\.dispatch\.preferred\('reference'\)"
    with pytest.raises(TypeError, match=words):
        jax.jit(transform(lambda x: (model(x)[0] ** 2).sum())).lower(inputs()[:1, :4])


@pytest.mark.sample(25)
@every_mixer
def test_forward_mode_goes_through_the_references(entry):
    model, x = build(entry), inputs()[:1, :6]
    rng = np.random.default_rng(0)
    tangent, cotangent = (jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for _ in range(2))

    @jax.jit
    def both(x):
        with dispatch.preferred("reference"):
            forward = jax.jvp(lambda x: model(x)[0], (x,), (tangent,))[1]
        return forward, jax.vjp(lambda x: model(x)[0], x)[1](cotangent)[0]

    forward, reverse = both(x)
    np.testing.assert_allclose(jnp.vdot(forward, cotangent), jnp.vdot(reverse, tangent), rtol=1e-3, atol=1e-3)
