"""Types: strict promotion is for the program around a primitive, and numbers of 64 bits come only from arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers.kernels.suites import SUITES, by_call
from tests.layers.kernels.test_primitives import call, cast, draw, parted

IDS = np.array([[1] * 6 + [2] * 3 + [0] * 2] * 2, np.int32)
WIDE = {"float32": "float64", "complex64": "complex128"}
calls = by_call(
    slow=lambda name, case, impl: (
        impl != "xla" or case is not SUITES[name].cases[-1] or name not in ("attention", "ssm_kernel")
    )
)


def types(name, case, impl, arguments):
    """Types of outputs and gradients; nothing is computed."""
    moving, fixed = parted(arguments)
    extra = {"segment_ids": jnp.asarray(IDS)} if case.segments else {}

    def loss(moving):
        out = call(SUITES[name], case, impl, moving | fixed, **extra)
        return sum(
            jnp.sum(jnp.square(jnp.abs(leaf))).astype(jnp.float32) for leaf in jax.tree.leaves(out)
        ), out

    (_, out), gradients = jax.eval_shape(jax.value_and_grad(loss, has_aux=True), moving)
    return {str(leaf.dtype) for leaf in jax.tree.leaves((out, gradients))}


@calls
def test_strict_promotion_and_64_bits(name, case, impl):
    arguments = draw(case, 2, IDS.shape[1])
    with jax.numpy_dtype_promotion("strict"):
        assert types(name, case, impl, cast(arguments, "bfloat16")) <= {"bfloat16", "float32", "complex64"}
        with jax.enable_x64(True):
            narrow = cast(arguments, "float32")
            assert types(name, case, impl, narrow) <= {"float32", "complex64"}
            wide = jax.tree.map(lambda x: x.astype(WIDE.get(str(x.dtype), x.dtype)), narrow)
            if impl == "tpu":
                with pytest.raises(ValueError, match="an array has dtype .*; expected float32, bfloat16 or"):
                    types(name, case, impl, wide)
            else:
                assert types(name, case, impl, wide) <= {"float64", "complex128"}
