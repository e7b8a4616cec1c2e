"""Models: scan, remat, states, pooling, masking, and the errors of their configs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels import build_model
from seqmodels.embedding import SMALL_TABLE, look_up
from seqmodels.encoder import pool
from seqmodels.names import by_layer

CLASSIFIER = {
    "kind": "classifier",
    "width": 8,
    "depth": 5,
    "pattern": ("s5", "attention+mlp"),
    "mixers": {"s5": {"state_size": 4, "bidirectional": True}, "attention": {"heads": 2, "causal": False}},
    "norm": "batch_norm",
    "dropout": 0.2,
    "vocab_size": 7,
    "num_classes": 3,
}
LANGUAGE_MODEL = {
    "kind": "language_model",
    "width": 8,
    "depth": 4,
    "pattern": ("s5+none", "local", "attention"),
    "mixers": {
        "local": {"mixer": "attention", "window": 3, "heads": 2},
        "attention": {"heads": 2},
        "s5": {"state_size": 4},
    },
    "vocab_size": 7,
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 7, (3, 12)))
IDS = jnp.asarray(np.arange(12)[None] < np.array([[12], [5], [9]]), jnp.int32)


def build(base, **changes):
    return build_model(base | changes, rngs=nnx.Rngs(0))


@functools.cache
def make(kind="classifier", **changes):
    return build(CLASSIFIER if kind == "classifier" else LANGUAGE_MODEL, **changes)


def jitted(model):
    """The model as one jitted function of arrays."""
    graph, variables = nnx.split(model)

    @jax.jit
    def run(inputs, state=None, segment_ids=None, key=None):
        return nnx.merge(graph, variables, copy=True)(inputs, state, segment_ids=segment_ids, key=key)

    return run


def train(model):
    """Loss, gradients and new statistics of one training call."""
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    @jax.jit
    def run(params, stats):
        def loss(params):
            model = nnx.merge(graph, params, stats, copy=True)
            outputs, _ = model(TOKENS, segment_ids=IDS, key=jax.random.key(3))
            return jnp.square(outputs).mean(), nnx.state(model, nnx.BatchStat)

        (value, stats_after), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return value, gradients, stats_after

    return run(params, stats)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"scan": False},
        pytest.param({"remat": "full"}, marks=pytest.mark.slow),
        pytest.param({"scan": False, "remat": "dots"}, marks=pytest.mark.slow),
        pytest.param({"remat": "attention"}, marks=pytest.mark.slow),
    ],
)
def test_scan_and_remat_change_nothing(changes):
    (want, *wanted), (got, *found) = train(make()), train(make(**changes))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for one, other in zip(wanted, found, strict=True):
        one, other = by_layer(one), by_layer(other)
        assert one.keys() == other.keys()
        for name, array in one.items():
            np.testing.assert_allclose(other[name], array, atol=1e-5, rtol=1e-4, err_msg=name)


def test_recomputing_all_but_attention_takes_its_forward_pass_once():
    """The loops of its two passes, and the one that runs it again if nothing is kept, in each of two layers."""

    def loops(remat):
        layer = {"pattern": ("attention+none",), "depth": 2, "mixers": {"attention": {"heads": 2}}}
        graph, params = nnx.split(build(LANGUAGE_MODEL | layer, remat=remat, scan=False), nnx.Param)
        loss = lambda params: jnp.square(nnx.merge(graph, params, copy=True)(TOKENS)[0]).mean()  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(params)).count(" scan[")

    assert [loops(remat) for remat in ("none", "attention", "full")] == [4, 4, 6]


def test_scanned_and_unrolled_models_hold_the_same_parameters():
    one, two = (by_layer(make(scan=scan)) for scan in (True, False))
    assert one.keys() == two.keys()
    assert {"stack/blocks/3/mixer/query/kernel", "stack/blocks/4/mixer/b"} <= one.keys()
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.slow
def test_training_updates_every_running_statistic_and_inference_none():
    model = make()
    run = jitted(model)
    _, _, after = train(model)
    before = nnx.state(model, nnx.BatchStat)
    for b, a in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert not np.array_equal(a, b)
    first, _ = run(TOKENS, segment_ids=IDS)
    second, _ = run(TOKENS, segment_ids=IDS)
    np.testing.assert_array_equal(first, second)


@pytest.mark.sample(2)
@pytest.mark.parametrize("scan", [True, False])
def test_inference_may_close_over_a_model_inside_jit(scan):
    model = build(CLASSIFIER, scan=scan)
    logits = jax.jit(lambda tokens: model(tokens)[0])(TOKENS)
    np.testing.assert_allclose(logits, model(TOKENS)[0], rtol=1e-5)


def test_dropout_follows_the_key():
    run = jitted(make())
    outputs = [run(TOKENS, segment_ids=IDS, key=jax.random.key(seed))[0] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert not np.array_equal(outputs[0], outputs[2])


@pytest.mark.sample(3)
@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
def test_padding_does_not_change_the_class(pooling):
    run = jitted(make(pooling=pooling))
    padded, _ = run(TOKENS, segment_ids=IDS)
    other, _ = run(jnp.where(IDS == 0, 0, TOKENS), segment_ids=IDS)
    np.testing.assert_array_equal(padded, other)
    alone, _ = run(TOKENS[1:2, :5])
    np.testing.assert_allclose(padded[1:2], alone, rtol=1e-5)


def test_pooling():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 2)), jnp.float32)
    mask = jnp.asarray([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]], bool)
    for how, want in {
        "mean": [x[0].mean(0), x[1, 1:3].mean(0)],
        "last": [x[0, 3], x[1, 2]],
        "first": [x[0, 0], x[1, 1]],
    }.items():
        got = pool(x, mask, how)
        np.testing.assert_allclose(got, [*want, np.zeros(2)], atol=1e-6)


@pytest.mark.sample(3)
@pytest.mark.parametrize("cuts", [[6], [1, 2, 7], [0, 6]])
def test_a_language_model_can_be_cut_anywhere(cuts):
    model = make("language_model")
    run = _language_model_runner()
    whole, none = run(TOKENS)
    assert none is None
    assert whole.dtype == jnp.float32
    state, outputs = model.init_state(3, max_length=12), []
    for start, stop in zip([0, *cuts], [*cuts, 12], strict=True):
        y, state = run(TOKENS[:, start:stop], state)
        outputs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), whole, atol=1e-5)


@functools.cache
def _language_model_runner():
    return jitted(make("language_model"))


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "positions",
    [{"absolute_positions": "learned", "max_positions": 12}, {"absolute_positions": "sinusoidal"}],
)
def test_absolute_positions_are_carried_and_restart_in_every_segment(positions):
    one = {"pattern": ("attention",), "mixers": {"attention": {"heads": 2, "position": "none"}}, "depth": 1}
    model = build(LANGUAGE_MODEL, **one, **positions)
    run = jitted(model)
    ids = jnp.asarray([[1] * 12, [0, 0, 1, 1, 1, 0, 1, 2, 2, 2, 2, 0], [1] * 4 + [3] * 8], jnp.int32)
    whole, _ = run(TOKENS, None, ids)
    state, outputs = model.init_state(3, max_length=12), []
    for cut in (slice(0, 6), slice(6, 6), slice(6, 12)):
        y, state = run(TOKENS[:, cut], state, ids[:, cut])
        outputs.append(y)
    real = np.asarray(ids) != 0
    np.testing.assert_allclose(jnp.concatenate(outputs, 1)[real], whole[real], atol=1e-5)
    alone, _ = run(TOKENS[1:2, 7:11])
    np.testing.assert_allclose(whole[1:2, 7:11], alone, atol=1e-5)
    # Without positions in the mixer, only those of the embedding tell equal tokens apart.
    equal, _ = run(jnp.ones((1, 6), int))
    assert float(jnp.abs(equal[0, 1:] - equal[0, :1]).max(-1).min()) > 1e-3


def test_embeddings_with_positions_against_the_equation():
    model = make("language_model", absolute_positions="sinusoidal")
    x, _ = model.embedding(TOKENS, segment_ids=IDS)
    table = np.asarray(model.embedding.table[...])
    frequency = 10_000.0 ** (-np.arange(0, 8, 2) / 8)
    for t in range(12):
        added = np.stack([np.sin(t * frequency), np.cos(t * frequency)], -1).ravel()
        np.testing.assert_allclose(x[0, t], table[TOKENS[0, t]] * np.sqrt(8) + added, atol=1e-5)


def test_learned_positions_end_with_their_table():
    model = make(absolute_positions="learned", max_positions=7)
    x, _ = model.embedding(TOKENS, segment_ids=IDS)
    np.testing.assert_allclose(
        x[0, :7], model.embedding.table[...][TOKENS[0, :7]] + model.embedding.positions[...], atol=1e-6
    )
    assert np.isnan(x[0, 7:]).all()
    assert np.isfinite(x[1]).all(), "padding takes no position"


def test_untied_output_matrix_and_bfloat16():
    model = make("language_model", tie_embeddings=False, dtype="bfloat16")
    logits, _ = model(TOKENS)
    assert logits.dtype == jnp.float32
    assert logits.shape == (3, 12, 7)
    assert model.head.kernel.shape == (8, 7)


@pytest.mark.parametrize("rows", [7, SMALL_TABLE + 1])
def test_gradients_of_tables_are_summed_in_float32(rows):
    model = make(
        "language_model", vocab_size=rows, dtype="bfloat16", absolute_positions="learned", max_positions=4
    )
    graph, parameters = nnx.split(model.embedding)

    def loss(parameters):
        x, _ = nnx.merge(graph, parameters)(jnp.full((500, 3), 2))
        return x.astype(jnp.float32).sum()

    gradients = jax.jit(jax.grad(loss))(parameters)
    np.testing.assert_array_equal(gradients.table[...][:, 0], 1500 * np.eye(rows)[2])
    np.testing.assert_array_equal(gradients.positions[...][:, 0], [500, 500, 500, 0])


@pytest.mark.parametrize("rows", [SMALL_TABLE, SMALL_TABLE + 1])
def test_gradients_of_a_look_up(rows):
    rng = np.random.default_rng(0)
    table, ids = rng.standard_normal((rows, 3)), rng.integers(0, rows, (4, 50))
    weights = rng.standard_normal((4, 50, 3)).astype(np.float32)
    want = np.zeros_like(table)
    np.add.at(want, ids, weights)

    def loss(table):
        return (look_up(table, jnp.asarray(ids), jnp.dtype("float32")) * weights).sum()

    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(table, jnp.float32)), want, atol=1e-5)


def test_forward_mode_into_a_small_table_is_refused():
    table, ids = jnp.ones((7, 4)), jnp.zeros((2, 3), jnp.int32)

    def looked_up(table):
        return look_up(table, ids, jnp.dtype("float32"))

    with pytest.raises(TypeError, match="an embedding of at most 64 rows has a backward pass of its own"):
        jax.jit(jax.jacfwd(looked_up)).lower(table)


def test_vectors_as_inputs():
    model = make(vocab_size=None, input_size=2)
    logits, _ = model(jnp.ones((2, 5, 2)))
    assert logits.shape == (2, 3)
    with pytest.raises(ValueError, match=r"expected \(b, t, 2\)"):
        model(jnp.ones((2, 5, 3)))
    with pytest.raises(ValueError, match="integer token ids"):
        make()(jnp.ones((2, 5)))


def test_joint_residual_is_one_branch():
    one = dict(pattern=("s5",), mixers={"s5": {"state_size": 4}}, channel="half_glu2", residual="joint")
    model = build(CLASSIFIER, **one, depth=1)
    block = model.stack.layers[0]
    assert block.channel_norm is None
    x = jax.random.normal(jax.random.key(0), (2, 6, 8))
    y, _ = block(x)
    inner, _ = block.mixer(block.mixer_norm(x))
    np.testing.assert_allclose(y, x + block.channel(inner), atol=1e-6)


def test_the_residual_is_scaled_in_both_branches():
    x = jax.random.normal(jax.random.key(0), (2, 6, 8))
    for norm_position in ("pre", "post"):
        options = {"norm": "layer_norm", "norm_position": norm_position, "residual_scale": 3.0}
        block = build(CLASSIFIER, **options, depth=1).stack.layers[0]
        want = x
        for branch, norm in (
            (lambda u, b=block: b.mixer(u)[0], block.mixer_norm),
            (block.channel, block.channel_norm),
        ):
            want = 3 * want + branch(norm(want)) if norm_position == "pre" else norm(3 * want + branch(want))
        np.testing.assert_allclose(block(x)[0], want, atol=1e-5)


def test_post_norm_normalises_the_sum():
    model = make(norm="layer_norm", norm_position="post", depth=1)
    y, _ = model.stack.layers[0](jax.random.normal(jax.random.key(0), (2, 6, 8)))
    np.testing.assert_allclose(np.asarray(y).mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(np.asarray(y).std(-1), 1, atol=1e-3)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "clasifier"}, "did you mean 'classifier'"),
        ({"widht": 8}, "no field 'widht'; did you mean 'width'"),
        ({"pattern": ("atention",), "mixers": {}}, "unknown mixer 'atention'; did you mean 'attention'"),
        ({"pattern": ()}, "expected a tuple of names"),
        ({"pattern": ("s5+half_glu2",)}, "mixers has options for 'attention'"),
        ({"mixers": {**CLASSIFIER["mixers"], "attention": {"heads": 3}}}, "heads=3 does not divide width=8"),
        ({"mixers": {**CLASSIFIER["mixers"], "s5": {"state_sise": 4}}}, "did you mean 'state_size'"),
        ({"channel": "swigl"}, "did you mean 'swiglu'"),
        ({"norm": "batchnorm"}, "did you mean 'batch_norm'"),
        ({"remat": "all"}, "remat='all'"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"residual_scale": 0.0}, "residual_scale=0.0"),
        ({"depth": 0}, "depth=0"),
        ({"pooling": "max"}, "pooling='max'"),
        ({"num_classes": 1}, "num_classes=1"),
        ({"input_size": 4}, "set vocab_size for tokens or input_size for vectors"),
        ({"residual": "joint", "channel": "none"}, "needs a channel mixer"),
        ({"dtype": "float8_e4m3fn"}, "dtype="),
        ({"absolute_positions": "learnd"}, "did you mean 'learned'"),
        ({"absolute_positions": "learned"}, "need the size of their table"),
        ({"max_positions": 5}, "max_positions=5 with absolute_positions='none'"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build_model(CLASSIFIER | changes, rngs=nnx.Rngs(0))


def test_missing_fields_are_named():
    with pytest.raises(ValueError, match="needs the options? .*depth"):
        build_model({"kind": "classifier", "width": 8, "vocab_size": 3, "num_classes": 2}, rngs=nnx.Rngs(0))


def test_a_language_model_refuses_what_is_not_causal():
    with pytest.raises(ValueError, match=r"layer 0 \(s5\) is not causal"):
        build_model(
            LANGUAGE_MODEL | {"mixers": {**LANGUAGE_MODEL["mixers"], "s5": {"bidirectional": True}}},
            rngs=nnx.Rngs(0),
        )
    with pytest.raises(ValueError, match="vocab_size"):
        build_model(LANGUAGE_MODEL | {"vocab_size": None, "input_size": 3}, rngs=nnx.Rngs(0))


def test_a_classifier_takes_no_state():
    with pytest.raises(ValueError, match="takes no state"):
        make()(TOKENS, ())


def test_matrices_are_stored_in_their_type_and_everything_else_in_float32():
    model = make("language_model", param_dtype="bfloat16")
    stored = {name: array.dtype for name, array in by_layer(nnx.state(model, nnx.Param)).items()}
    assert stored["stack/blocks/1/mixer/query/kernel"] == stored["embedding/table"] == jnp.bfloat16
    assert stored["stack/blocks/0/mixer/b"] == stored["norm/scale"] == jnp.float32
    want, _ = jitted(make("language_model"))(TOKENS)
    got, _ = jitted(model)(TOKENS)
    np.testing.assert_allclose(got, want, atol=0.05)
