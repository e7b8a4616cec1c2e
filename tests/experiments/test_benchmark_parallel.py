"""What divided time sends: the count from compiled programs, and the published formulas."""

import jax
import pytest

from experiments.benchmark import parallel, parallel_packing, parallel_row
from experiments.benchmark.collectives import bytes_sent

SIZES = parallel.Sizes(1, 64, heads=8, kv_heads=2, head_dim=4, dtype="float32")

PROGRAM = """\
HloModule jit_f, num_partitions=4

%body (p: (s32[], f32[2,8])) -> (s32[], f32[2,8]) {
  %sent = bf16[2,8]{1,0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
}

%condition (p: (s32[], f32[2,8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %z = f32[] add(%x, %y)
}

%left (p: f32[4]) -> f32[4] {
  %sum = f32[4]{0} all-reduce(%p), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
}

%right (p: f32[4]) -> f32[4] {
  ROOT %same = f32[4]{0} copy(%p)
}

ENTRY %main (a: f32[2,8]) -> f32[2,8] {
  %all = f32[8,8]{1,0} all-gather(%a), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  %parts = (f32[1,8]{1,0}, f32[1,8]{1,0}) all-to-all(%b, %c), channel_id=2, replica_groups=[2,2]<=[4]
  %scattered = f32[2]{0} reduce-scatter(%d), replica_groups=mesh['data'=1,'sequence'=4] {'sequence'}, to_apply=%add
  %start = (f32[4]{0}, f32[16]{0}) all-gather-start(%e), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}
  %kept = f32[9]{0} collective-permute(%f), source_target_pairs={{0,0},{1,1}}
  %loop = (s32[], f32[2,8]) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %chosen = f32[4]{0} conditional(%i, %p, %q), branch_computations={%left, %right}
}
"""


def test_bytes_are_counted_by_kind_and_by_how_often_loops_run():
    assert bytes_sent(PROGRAM) == {
        "all-gather": 8 * 8 * 4 * 3 // 4 + 16 * 4 * 3 // 4,
        "all-to-all": 2 * 8 * 4 // 2,
        "reduce-scatter": 2 * 4 * 3,
        "collective-permute": 3 * 2 * 8 * 2,
        "all-reduce": 2 * 4 * 4 // 2,
    }
    with pytest.raises(ValueError, match="the loop body sends, and its number of steps is not known"):
        bytes_sent(PROGRAM.replace("known_trip_count", "unknown"))


def counted(name):
    (method,) = parallel.chosen((name,))
    passes = parallel.compiled_passes(method, SIZES, jax.devices()[:4])
    return [bytes_sent(one.as_text()).total() for one, _ in passes.values()], [
        cost.bytes for cost in method.cost(SIZES, 4)
    ]


@pytest.mark.parametrize(
    "name",
    [
        "attention/ulysses",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "attention/all_gather",
                "attention/zigzag",
                "attention/score_ring",
                "gated_linear_attention/all_scan",
                "delta_rule/all_gather",
                "linear_recurrence",
                "short_conv",
                "long_conv",
            )
        ),
    ],
)
def test_a_compiled_program_sends_what_the_formula_says(name):
    found, published = counted(name)
    assert found == published


def test_the_model_knows_what_limits_each_method():
    """On many devices gathering states costs more than their flow, and a short convolution stays cheap."""
    sizes, links = parallel.Sizes(1, 2**20), parallel.Links()
    rows = {(r["primitive"], r["method"], r["devices"]): r for r in parallel.extrapolated((), sizes, links)}
    linear = "gated_linear_attention"
    assert rows[linear, "all_scan", 1024]["ms"] < 0.5 * rows[linear, "all_gather", 1024]["ms"]
    assert rows["attention", "zigzag", 8]["ms"] < 0.6 * rows["attention", "ring", 8]["ms"]
    assert rows["attention", "ring", 1]["ms"] == rows["attention", "zigzag", 1]["ms"]
    assert ("attention", "ulysses", 32) not in rows
    fast = parallel.extrapolated(("attention/ring",), sizes, parallel.Links(flops=8e14))
    assert fast[0]["ms"] == pytest.approx(rows["attention", "ring", 1]["ms"] / 2)


DOCUMENTS = [70000, 9000, 300, 4000, 12000, 100, 2500, 800]


def test_documents_get_devices_by_their_length():
    model = parallel_packing.Model(parallel.Sizes(1, 1), parallel.Links(), capacity=16384)
    placed = parallel_packing.flexible(DOCUMENTS, 8, model)
    assert sorted(one.tokens for one in placed) == sorted(DOCUMENTS)
    by_tokens = {one.tokens: one for one in placed}
    assert by_tokens[70000].devices == 8  # five hold it
    assert by_tokens[100].devices == 1
    assert all(one.first % one.devices == 0 and one.tokens <= one.devices * 16384 for one in placed)
    assert parallel_packing.duration(placed, 8) >= sum(model.seconds(n, 1) for n in DOCUMENTS) / 8
    # Many short documents beside a long one: sharing rows sends them all to everyone.
    many = [20000] + 200 * [500]
    together = parallel_packing.uniform(many, 8, model)
    assert parallel_packing.duration(parallel_packing.flexible(many, 8, model), 8) < 0.95 * together
    # Two on one device follow each other; one on both waits for both.
    pieces = [
        parallel_packing.Placed(1, first, count, 1.0) for first, count in ((0, 1), (0, 1), (0, 2), (1, 1))
    ]
    assert parallel_packing.duration(pieces, 2) == 4


def test_the_cost_of_a_document():
    """Work by the token and by pairs of tokens, and what its keys and values send, as written by hand."""
    links = parallel.Links(latency=1e-3, bandwidth=1e6, flops=1e6)
    model = parallel_packing.Model(parallel.Sizes(1, 1, 2, 1, 4, "float32"), links, capacity=100)
    alone = 3 * (2 * 50**2 * 8 + 24 * 50 * 64) / 1e6
    assert model.seconds(50, 1) == pytest.approx(alone)
    sent = 3 * (3e-3 + 50 * (4 + 4) * 4 * 3 / 4 / 1e6)
    assert model.seconds(50, 4) == pytest.approx(alone / 4 + sent)
    with pytest.raises(ValueError, match="a document of 900 tokens; 8 devices of capacity=100 hold 800"):
        parallel_packing.flexible([900], 8, model)
    with pytest.raises(ValueError, match="devices=6; expected a power of two"):
        parallel_packing.flexible([9], 6, model)


def test_what_cannot_be_compared_is_named():
    with pytest.raises(ValueError, match="JAX sees one; .*device_count=8"):
        parallel.run((), SIZES, jax.devices()[:1], 1, print)
    with pytest.raises(ValueError, match="time=64 cannot be divided over 3 devices; use a multiple of 6"):
        parallel.run((), SIZES, jax.devices()[:3], 1, print)
    with pytest.raises(ValueError, match="only='star' is no method; .*attention/ring"):
        parallel.chosen(("star",))


@pytest.mark.slow
def test_chunks_with_a_carried_state_give_what_a_divided_row_gives():
    found = parallel_row.compare(64, 16, jax.devices()[:2])
    assert found["tokens_per_device"] == [32]
    assert found["difference"] < 2e-5
