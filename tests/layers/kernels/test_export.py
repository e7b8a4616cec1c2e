"""`jax.export` with a symbolic batch and length: one program for all, or an error that says which size must be known."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax import export

from layers.kernels.attention import Mask, attention
from tests.layers.kernels.suites import SUITES, by_call
from tests.layers.kernels.test_primitives import call, cast, close, draw, parted, tolerance_of

BATCH, TIME = 7, 11


@pytest.fixture(autouse=True)
def _symbols_are_no_integers():
    """Sizes of shapes are symbols here, which the checks of annotations take for a mistake."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


calls = by_call(
    slow=lambda name, case, impl: (
        impl != "xla" or case is not SUITES[name].cases[0] or name not in ("linear_recurrence", "long_conv")
    )
)


LISTS = "blocks", "chosen_blocks"
NEEDS_NUMBER = "q has t tokens, a symbol; block_indices needs a number: export each length by itself"


def symbolic(suite, arguments, *, time):
    """The arguments as shapes, with symbols for the axes of batch and time."""
    b, t = export.symbolic_shape("b, t")

    def one(name, x):
        shape = list(x.shape)
        if name in suite.time_arguments and x.ndim > 1:
            shape[0] = b if shape[0] == BATCH else shape[0]
            shape[1] = t if shape[1] == TIME and time else shape[1]
        if name == "initial_state":
            shape[0] = b
        return jax.ShapeDtypeStruct(tuple(shape), x.dtype)

    return {name: jax.tree.map(lambda x, name=name: one(name, x), x) for name, x in arguments.items()}


@calls
def test_one_program_for_all_sizes(name, case, impl):
    suite = SUITES[name]
    arguments = cast(draw(case, BATCH, TIME), "float32")
    if name == "ssm_kernel" or case.name == "prefix":
        return

    def run(arguments):
        return call(suite, case, impl, arguments)

    if case.name in LISTS:
        with pytest.raises(ValueError, match=NEEDS_NUMBER):
            export.export(jax.jit(run))(symbolic(suite, arguments, time=True))
        return

    if name == "long_conv":
        with pytest.raises(ValueError, match="x has t tokens .* symbols; .* export each length by itself"):
            export.export(jax.jit(run))(symbolic(suite, arguments, time=True))
    shapes = symbolic(suite, arguments, time=name != "long_conv")
    if impl == "tpu":
        with pytest.raises(ValueError, match="has shape .*its kernels need numbers: export with impl='xla'"):
            export.export(jax.jit(run))(shapes)
        return
    program = export.export(jax.jit(run))(shapes)
    other = cast(draw(case, 2, TIME if name == "long_conv" else 41), "float32")
    want = jax.tree.map(np.asarray, jax.jit(run)(other))
    close(program.call(other), want, tolerance_of(case, "float32"), "a call of another size")


@pytest.mark.slow
@calls
def test_gradients_of_all_sizes(name, case, impl):
    suite = SUITES[name]
    if name == "ssm_kernel" or case.name in ("prefix", *LISTS) or impl == "tpu":
        return

    def gradients(arguments):
        moving, fixed = parted(arguments)

        def loss(moving):
            out = call(suite, case, impl, moving | fixed)
            return sum(jnp.sum(jnp.square(jnp.abs(leaf))) for leaf in jax.tree.leaves(out))

        return jax.grad(loss)(moving)

    time = name != "long_conv"
    arguments = symbolic(suite, cast(draw(case, BATCH, TIME), "float32"), time=time)
    program = export.export(jax.jit(gradients))(arguments)
    other = cast(draw(case, 2, 41 if time else TIME), "float32")
    want = jax.tree.map(np.asarray, jax.jit(gradients)(other))
    close(program.call(other), want, 10 * tolerance_of(case, "float32"), "gradients at another size")


def test_lists_of_blocks_need_a_known_length():
    (t,) = export.symbolic_shape("t")
    q = jax.ShapeDtypeStruct((1, t, 1, 4), jnp.float32)
    mask = Mask(block_indices=jnp.zeros((1, 1, 4, 1), jnp.int32), block_size=8)
    with pytest.raises(ValueError, match="q has t tokens, a symbol; block_indices needs a number"):
        export.export(jax.jit(lambda q: attention(q, q, q, mask=mask)))(q)
