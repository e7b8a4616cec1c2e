"""The Triton kernels of `selective_scan` in pieces of time: interpreted, lowered, and on a GPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from layers.kernels import pallas_triton
from layers.kernels.selective_scan import gpu_pieces
from layers.kernels.selective_scan.cases import SUITE
from tests.layers.kernels import test_primitives as shared
from tests.layers.kernels.test_gated_linear_attention_gpu import ids_of
from tests.layers.kernels.test_linear_recurrence_gpu import poisoned
from tests.layers.kernels.test_selective_scan_gpu import CASES, TOLERANCES, arguments_of


def check(case, arguments, dtype, ids=None):
    """Compares results and all gradients with the float64 reference."""
    options = {} if ids is None else {"segment_ids": ids}
    got, want, _ = shared.beside_reference(
        SUITE, case, "gpu_pieces", shared.cast(arguments, dtype), **options
    )
    shared.close(got, want, TOLERANCES[dtype], "results and gradients")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CASES)
def test_interpreted(monkeypatch, name, dtype):
    """Two pieces with segments; 11 steps end within a span."""
    for bound, value in {"FORWARD_PROGRAMS": 4, "BACKWARD_PROGRAMS": 4, "SHORTEST_PIECE": 4}.items():
        monkeypatch.setattr(gpu_pieces, bound, value)
    ids = ids_of(np.random.default_rng(0), (2, 11), 0.1)
    with pallas_triton.interpreted():
        check(CASES[name], shared.draw(CASES[name], 2, 11), dtype, ids)


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [(3, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("segments", [False, True], ids=["whole", "segments"])
def test_interpreted_in_pieces(monkeypatch, pieces, segments):
    """Pieces of time, other ones in either pass, pass states on; the last piece is shorter, and some begin or contain segments."""
    rng = np.random.default_rng(4)
    ids = ids_of(rng, (2, 21), 0.1) if segments else None
    forward, backward = (2 * count for count in pieces)
    for name, value in {
        "FORWARD_PROGRAMS": forward,
        "BACKWARD_PROGRAMS": backward,
        "SHORTEST_PIECE": 4,
    }.items():
        monkeypatch.setattr(gpu_pieces, name, value)
    with pallas_triton.interpreted():
        check(CASES["mamba"], arguments_of(rng, 2, 21, 20, 3), "float32", ids)


def test_piece_length(monkeypatch):
    """As many pieces as make the programs, none too short, all of whole spans."""
    monkeypatch.setattr(gpu_pieces, "SHORTEST_PIECE", 128)
    for batch, time, channels, programs, length in (
        (8, 4096, 4096, 1024, 4096),
        (8, 4096, 1536, 768, 2048),
        (1, 4096, 1536, 2048, 128),
        (1, 100, 32, 2048, 100),
        (1, 1001, 32, 3, 336),
    ):
        assert gpu_pieces.piece_length(batch, time, channels, programs) == length


@pytest.mark.slow
@pytest.mark.parametrize("states, groups", [(1, 1), (20, 1), (2, 2)])
def test_interpreted_states_and_groups(states, groups):
    """One state, more than one vector of lanes for b and c, and two groups, whose gradients are sums over their own programs."""
    arguments = arguments_of(np.random.default_rng(1), 1, 5, 64, states, groups=groups)
    with pallas_triton.interpreted():
        check(CASES["mamba"], arguments, "float32")


@pytest.mark.slow
def test_lowers_for_a_gpu_by_shards():
    """Rows and channels are shared out as those of x are, in two pieces of time."""
    mesh = pallas_triton.hopper_mesh(data=4, model=2)
    spec = P("data", None, "model")
    x = jax.ShapeDtypeStruct((8, 256, 128), jnp.bfloat16, sharding=jax.NamedSharding(mesh, spec))

    def loss(x, dt):
        a, b = -jnp.ones((128, 2)), jnp.ones((8, 256, 1, 2))
        y, final = gpu_pieces.selective_scan(x, dt, a, b, b, None, None, None, True, None, None)
        return y.sum() + final.sum()

    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(x, x)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "tensor<2x256x64xbf16>" in text
        assert "selective_scan_effects_backward" in text
        assert [aval.sharding.spec for aval in traced.jaxpr.out_avals] == [spec] * 2


def test_lines_of_ptx_take_numbers(monkeypatch, capfd):
    """A start of a segment reaches the assembly as a number: that backend lowers some selections between two numbers to booleans."""
    monkeypatch.setattr(
        pallas_triton.pl, "pallas_call", functools.partial(pallas_triton.pl.pallas_call, debug=True)
    )
    x, vectors, a = (jnp.zeros(shape) for shape in ((1, 16, 32), (1, 16, 1, 32), (2, 32)))
    series = gpu_pieces.kernels.Series(x, x, vectors, None, jnp.zeros((1, 16), jnp.int32))
    with jax.sharding.use_abstract_mesh(pallas_triton.hopper_mesh()):
        traced = jax.jit(
            lambda series, a: gpu_pieces.kernels.effects(series, a, None, softplus=False, length=8)
        ).trace(series, a)
        traced.lower(lowering_platforms=("cuda",))
    found = re.findall(r"tt.elementwise_inline_asm.* : \(?([^()]*)\)? ->", capfd.readouterr().out)
    assert found
    assert {kind for kinds in found for kind in kinds.split(", ")} == {"tensor<32xf32>"}


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(2, 700, 96, 16), (1, 130, 40, 5), (3, 64, 256, 32)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_on_gpu(sizes, dtype):
    """Fresh random inputs over memory that was filled with NaN, with segments."""
    rng = np.random.default_rng()
    poisoned(2**26)
    check(CASES["mamba"], arguments_of(rng, *sizes), dtype, ids_of(rng, sizes[:2], 0.01))
