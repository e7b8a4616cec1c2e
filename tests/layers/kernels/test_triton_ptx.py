"""What kernels of Pallas's Triton backend write as PTX, run line by line in NumPy, one array per register."""

import jax.numpy as jnp
import numpy as np
import pytest

from layers.kernels import triton_ptx
from layers.kernels.triton_ptx import LANES, in_one_operation, of_lanes, sums_over_lanes

OPERATIONS = {
    "mov.u32": lambda x: x,
    "mov.f32": lambda x: x,
    "mul.f32": np.multiply,
    "add.f32": np.add,
    "sub.f32": np.subtract,
    "ex2.approx.ftz.f32": np.exp2,
    "and.b32": np.bitwise_and,
    "setp.ne.u32": np.not_equal,
    "setp.gt.f32": np.greater,
    "selp.f32": lambda u, v, p: np.where(p, u, v),
    "shfl.sync.bfly.b32": lambda x, mask, *_: x[np.arange(LANES) ^ mask],
    "shfl.sync.idx.b32": lambda x, lane, *_: np.broadcast_to(x[lane], x.shape),
}


def run(lines, values):
    """Runs lines of PTX; $0 is the result, $1 and on are the values."""
    registers = {f"${1 + number}": np.asarray(value, np.float32) for number, value in enumerate(values)}
    registers["%laneid"] = np.arange(LANES)

    def read(name):
        if name.startswith("0f"):
            return np.frombuffer(bytes.fromhex(name[2:]), ">f4")[0]
        return registers[name] if name in registers else int(name, 0)

    for line in lines:
        if line not in ("{", "}") and not line.startswith(".reg"):
            operation, operands = line.removesuffix(";").split(" ", 1)
            target, *operands = operands.split(", ")
            registers[target] = OPERATIONS[operation](*map(read, operands))
    return jnp.asarray(registers["$0"])


@pytest.fixture
def draws(monkeypatch):
    monkeypatch.setattr(triton_ptx, "_assembled", run)
    return list(jnp.asarray(np.random.default_rng(0).standard_normal((2 * LANES, LANES)), jnp.float32))


def test_of_lanes(draws):
    for lane, found in enumerate(of_lanes(draws[0])):
        np.testing.assert_array_equal(found, np.full(LANES, draws[0][lane]))


def test_in_one_operation(draws):
    """Results come back in their places, also those that are inputs, and constants and selections."""

    def function(x, y, start):
        kept = jnp.where(start > 0.5, 0.0, jnp.exp2(x * y[0]) - 2.0 * y[1])
        return {"kept": kept, "sums": [kept + y[0], sum(y)]}

    arguments = draws[0], tuple(draws[1:3]), (draws[3] > 0).astype(jnp.float32)
    got, want = in_one_operation(function, *arguments), function(*arguments)
    assert 0 < jnp.count_nonzero(got["kept"]) < LANES
    for one, other in zip((got["kept"], *got["sums"]), (want["kept"], *want["sums"]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_sums_over_lanes(draws):
    """Lane l has the sum of value l, one of which is a constant."""

    def function(x, weight):
        return [jnp.zeros((LANES,), jnp.float32), *(v * weight for v in x[1:LANES])]

    got = sums_over_lanes(function, draws[:LANES], draws[-1])
    want = np.stack(draws[:LANES]) @ np.asarray(draws[-1])
    want[0] = 0
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
