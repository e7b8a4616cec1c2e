"""A classifier of molecules, by CANINE, is its equation, and hash embeddings stand in for a table in any model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.segments import Segments
from seqmodels import build_model
from tests.layers.mixers.literal import apply, filled, layer_norm, rms, softmax, wide

WIDTH, RATE, PRIMES, BUCKETS = 6, 3, (31, 43), 7
MODEL = dict(
    kind="classifier",
    vocab_size=50,
    num_classes=3,
    width=WIDTH,
    depth=1,
    pattern=("attention",),
    mixer_defaults=dict(heads=1, position="none", causal=False),
    channel="none",
    hashes=2,
    buckets=BUCKETS,
    molecules=RATE,
    characters=dict(pattern=("local",), mixers={"local": dict(mixer="attention", window=2)}),
)
RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.integers(0, 50, (3, 11)))
# The molecules of rows of 11, 8 and 2 characters are 3, 2 and 1.
IDS = jnp.asarray(np.arange(11) < np.array([[11], [8], [2]]), jnp.int32)


def equation(model, codes):
    """The logits of one row."""
    tables = wide(model.embedding.hashed.tables)
    rows = [(codes + 1) * prime % BUCKETS for prime in PRIMES]
    x = np.concatenate([table[row] for table, row in zip(tables, rows, strict=True)], axis=1)

    def layer(block, x, window):
        y = rms(x, block.mixer_norm.config.epsilon) * wide(block.mixer_norm.scale)
        q, k, v = (apply(f, y) for f in (block.mixer.query, block.mixer.key, block.mixer.value))
        seen = [[j for j in range(len(x)) if abs(i - j) <= window] for i in range(len(x))]
        o = np.array([softmax(k[s] @ q[i] / np.sqrt(WIDTH)) @ v[s] for i, s in enumerate(seen)])
        return x + apply(block.mixer.output, o)

    x = layer(model.characters.layers[0], x, 2)
    down = model.downsample
    made = [x[0]]
    for i in range(1, max(1, len(x) // RATE)):
        y = apply(down.convolution, x[RATE * (i - 1) : RATE * i].reshape(-1))
        made.append(y * np.array([0.5 * (1 + float(jax.scipy.special.erf(v / np.sqrt(2)))) for v in y]))
    m = layer_norm(np.array(made), down.norm.config.epsilon) * wide(down.norm.scale) + wide(down.norm.bias)
    m = layer(model.stack.layers[0], m, len(m))
    h = rms(m, model.norm.config.epsilon) * wide(model.norm.scale)
    return apply(model.head, h.mean(0))


@pytest.mark.slow
def test_logits_are_those_of_the_equation_and_padding_is_not_read():
    model = filled(lambda: build_model(MODEL, rngs=nnx.Rngs(0)))
    run = nnx.jit(
        lambda model, tokens: model(tokens, segment_ids=Segments.of(IDS, padding="end", packed=False))[0]
    )
    got = run(model, jnp.where(IDS == 1, TOKENS, 49))
    for row, count in enumerate((11, 8, 2)):
        np.testing.assert_allclose(got[row], equation(model, np.asarray(TOKENS[row, :count])), atol=2e-5)
    np.testing.assert_allclose(model(TOKENS[:1])[0], got[:1], atol=2e-6)
    with pytest.raises(ValueError, match="any number of segments per row"):
        model(TOKENS, segment_ids=IDS)


@pytest.mark.slow
def test_a_classifier_of_molecules_learns():
    """The parity of the first character, which is a molecule of its own."""
    model = build_model(MODEL | dict(width=12, num_classes=2, pooling="first"), rngs=nnx.Rngs(0))
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    codes = np.random.default_rng(1).integers(0, 4, (64, 12))
    labels = jnp.asarray(codes[:, 0] % 2)

    @jax.jit
    def step(parameters):
        def loss(parameters):
            logits, _ = nnx.merge(graph, parameters, rest)(jnp.asarray(codes), key=jax.random.key(0))
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean()

        value, gradients = jax.value_and_grad(loss)(parameters)
        return value, jax.tree.map(lambda p, g: p - 0.3 * g, parameters, gradients)

    values = []
    for _ in range(60):
        value, parameters = step(parameters)
        values.append(float(value))
    assert values[-1] < 0.2 < 0.5 < values[0]


@pytest.mark.slow
def test_a_language_model_with_hash_embeddings_has_no_table():
    model = build_model(
        dict(
            kind="language_model",
            vocab_size=50,
            width=8,
            depth=1,
            pattern=("gla",),
            mixer_defaults=dict(heads=2),
        )
        | dict(hashes=4, buckets=16, tie_embeddings=False),
        rngs=nnx.Rngs(0),
    )
    assert not hasattr(model.embedding, "table")
    logits, _ = model(TOKENS)
    assert logits.shape == (3, 11, 50)
    with pytest.raises(ValueError, match=r"inputs\[0, 0\] is 50; expected 0 to 49"):
        model(jnp.full((1, 2), 50))
