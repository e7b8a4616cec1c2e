"""An encoder-decoder is its equation, reads no padding and no later target, and generates what whole targets give."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.training.model import SplitModel
from layers.segments import Segments
from seqmodels import build_model, generate_from
from seqmodels.block import Encoded

VOCABULARY = 7
MODEL = dict(
    kind="encoder_decoder",
    vocab_size=VOCABULARY,
    width=8,
    depth=1,
    pattern=("attention",),
    mixer_defaults=dict(heads=2, position="none"),
    absolute_positions="learned",
    max_positions=12,
    channels=dict(swiglu=dict(hidden=6)),
)
RNG = np.random.default_rng(0)
SOURCE, TARGET = RNG.integers(0, VOCABULARY, (2, 6)), RNG.integers(0, VOCABULARY, (2, 5))
SOURCE_IDS = np.array([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
IDS = np.array([[1, 1, 1, 1, 1], [0, 1, 1, 1, 0]])


def built(**options):
    made = build_model(MODEL | options, rngs=nnx.Rngs(0))
    # Norms of factor 1 would hide which of them is taken.
    for number, (path, variable) in enumerate(nnx.to_flat_state(nnx.state(made, nnx.Param))):
        if path[-1] == "scale":
            variable.set_value(
                variable[...] + 0.1 * jax.random.normal(jax.random.key(number), variable.shape)
            )
    return made


@pytest.fixture(scope="module")
def model():
    return built()


@pytest.fixture(scope="module")
def outputs(model):
    """Logits of whole targets, and those of targets in two parts."""

    @nnx.jit
    def run(model, source, target, source_ids, ids):
        whole, _ = model(source, target, source_segment_ids=source_ids, segment_ids=ids)
        state = model.init_state(source, max_length=5, segment_ids=source_ids)
        first, state = model.decoder(target[:, :2], state, segment_ids=ids[:, :2])
        second, _ = model.decoder(target[:, 2:], state, segment_ids=ids[:, 2:])
        return whole, jnp.concatenate([first, second], axis=1)

    return [np.asarray(y) for y in run(model, *map(jnp.asarray, (SOURCE, TARGET, SOURCE_IDS, IDS)))]


def equation(model, source, target):
    """The logits of one row without padding, in float64: Vaswani et al. 2017 with norms where the config has them."""

    def array(variable):
        return np.asarray(variable[...], np.float64)

    def norm(x, layer):
        if layer is None:
            return x
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + layer.config.epsilon) * array(layer.scale)

    def heads(x, layer):
        return (x @ array(layer.kernel)).reshape(len(x), 2, 4)

    def attend(layer, x, y, causal):
        q, k, v = heads(x, layer.query), heads(y, layer.key), heads(y, layer.value)
        weights = np.exp(np.einsum("ihk,jhk->hij", q, k) / 2)
        weights = np.tril(weights) if causal else weights
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("hij,jhk->ihk", weights, v).reshape(len(x), 8) @ array(layer.output.kernel)

    def channel(layer, x):
        gate = x @ array(layer.gate.kernel)
        return (gate / (1 + np.exp(-gate)) * (x @ array(layer.up.kernel))) @ array(layer.down.kernel)

    position = model.decoder.config.stack.norm_position

    def add(x, branch, inner, outer):
        """x and the branch of what is read of it, with norms where `position` says."""
        if position == "stream":
            x = norm(x, inner)
        y = norm(branch(norm(x, inner if position in ("pre", "both") else None)), outer)
        return norm(x + y, inner) if position == "post" else x + y

    embedding = model.decoder.embedding

    def embed(tokens):
        return array(embedding.table)[tokens] + array(embedding.positions)[: len(tokens)]

    e, x = embed(source), embed(target)
    for block in model.encoder.layers:
        e = add(
            e,
            partial(lambda f, u: attend(f, u, u, causal=False), block.mixer),
            block.mixer_norm,
            block.mixer_output_norm,
        )
        e = add(e, partial(channel, block.channel), block.channel_norm, block.channel_output_norm)
    e = norm(e, model.encoder_norm)
    for block in model.decoder.stack.layers:
        x = add(
            x,
            partial(lambda f, u: attend(f, u, u, causal=True), block.mixer),
            block.mixer_norm,
            block.mixer_output_norm,
        )
        x = add(
            x,
            partial(lambda f, u: attend(f, u, e, causal=False), block.cross),
            block.cross_norm,
            block.cross_output_norm,
        )
        x = add(x, partial(channel, block.channel), block.channel_norm, block.channel_output_norm)
    return norm(x, model.decoder.norm) @ array(embedding.table).T


@pytest.mark.parametrize("given", ["whole", "parts"])
def test_logits_are_those_of_the_equation_and_padding_on_both_sides_is_not_read(model, outputs, given):
    for row in range(2):
        expected = equation(model, SOURCE[row][SOURCE_IDS[row] == 1], TARGET[row][IDS[row] == 1])
        np.testing.assert_allclose(outputs[given == "parts"][row][IDS[row] == 1], expected, atol=2e-6)


@pytest.mark.slow
def test_no_later_target_and_every_token_of_the_source_is_read(model):
    @jax.jit
    def gradients(source, target, place):
        def output(source, target):
            encoded, _ = model.encoder(source)
            return model.decoder.stack(target, source=Encoded(encoded, None))[0][0, place].sum()

        return jax.grad(output, argnums=(0, 1))(source, target)

    given = (jnp.asarray(RNG.normal(size=(1, time, 8)), jnp.float32) for time in (6, 5))
    source, target = given
    found = [gradients(source, target, place) for place in range(5)]
    by_source, by_target = (np.stack([np.abs(g[n][0]).sum(-1) for g in found]) for n in (0, 1))
    assert by_source.min() > 0
    assert np.all(by_target[np.triu_indices(5, 1)] == 0)
    assert by_target[np.tril_indices(5)].min() > 0


@pytest.mark.slow
def test_generation_takes_the_best_token_of_each_step(model):
    sources = [SOURCE[0].tolist(), SOURCE[1][:4].tolist()]
    found = generate_from(model, sources, start=3, max_new_tokens=4, temperature=0.0)
    for row, source in enumerate(sources):
        target = [3]
        for _ in range(4):
            target.append(int(equation(model, source, target)[-1].argmax()))
        assert found.tokens[row].tolist() == target[1:]
    stopped = generate_from(
        model, sources[:1], start=3, max_new_tokens=4, temperature=0.0, stop=[found.tokens[0, 1:2]]
    )
    first = found.tokens[0].tolist().index(found.tokens[0, 1])
    assert (stopped.lengths[0], stopped.calls) == (first + 1, first + 1)


@pytest.mark.slow
def test_packed_pairs_give_what_they_give_alone(model):
    sources, targets = ([3, 1, 4], [1, 5]), ([2, 6], [5, 3, 5])
    rows = [jnp.asarray([both[0] + both[1]]) for both in (sources, targets)]
    ids = [jnp.asarray([[1] * len(both[0]) + [2] * len(both[1])]) for both in (sources, targets)]
    alone = [equation(model, *map(np.asarray, pair)) for pair in zip(sources, targets, strict=True)]
    packed, _ = model(*rows, source_segment_ids=ids[0], segment_ids=ids[1])
    np.testing.assert_allclose(packed[0], np.concatenate(alone), atol=2e-6)
    state = model.init_state(rows[0], max_length=5, segment_ids=ids[0])
    first, state = model.decoder(rows[1][:, :3], state, segment_ids=ids[1][:, :3])
    second, _ = model.decoder(rows[1][:, 3:], state, segment_ids=ids[1][:, 3:])
    np.testing.assert_allclose(jnp.concatenate([first, second], 1)[0], np.concatenate(alone), atol=2e-6)


@pytest.mark.slow
def test_training_reads_pairs_and_no_padding(model):
    del model
    options = dict(scan=True, depth=4, dropout=0.1, mixers=dict(attention=dict(kv_heads=1)))
    split = SplitModel(lambda rngs: build_model(MODEL | options, rngs=rngs), padding="end", packed=False)
    parameters, statistics = split.initialise(jax.random.key(0))
    ids = jnp.asarray(np.stack([SOURCE_IDS[:, ::-1][:, :5], np.sort(IDS)[:, ::-1]], 1))
    inputs = jnp.asarray(np.stack([SOURCE[:, :5], TARGET], 1))

    def loss(parameters, inputs):
        y, _ = split(parameters, statistics, dict(inputs=inputs, segment_ids=ids), key=jax.random.key(1))
        return jnp.where(ids[:, 1, :, None] == 1, y, 0).sum()

    run = jax.jit(jax.grad(loss))
    gradients = run(parameters, inputs)
    others = run(parameters, jnp.where(ids == 0, 6 - inputs, inputs))
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, others[name], err_msg=name)
        assert np.any(np.asarray(gradient) != 0), name


@pytest.mark.slow
@pytest.mark.parametrize("norm_position", ["post", "output", "both", "stream"])
def test_norms_stand_elsewhere_too(norm_position):
    made = built(norm_position=norm_position, depth=2)
    source, target = jnp.asarray(SOURCE), jnp.asarray(TARGET)
    whole, _ = made(source, target)
    for row in range(2):
        np.testing.assert_allclose(whole[row], equation(made, SOURCE[row], TARGET[row]), atol=5e-6)
    state = made.init_state(source, max_length=5)
    first, state = made.decoder(target[:, :2], state)
    second, _ = made.decoder(target[:, 2:], state)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=1e-5)
    longer = Segments.of(jnp.ones(source.shape, jnp.int32))
    np.testing.assert_allclose(made(source, target, source_segment_ids=longer)[0], whole, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["mamba", "attention"])
def test_a_prefix_is_what_stands_before_the_target(mixer):
    model = built(
        reading="prefix",
        pattern=(mixer,),
        absolute_positions="none",
        max_positions=None,
        mixer_defaults=dict(heads=2, state_size=4),
    )
    source, target = jnp.asarray(SOURCE), jnp.asarray(TARGET)

    @nnx.jit
    def run(model, source, target, ids):
        padded, _ = model(source, target, source_segment_ids=ids)
        state = model.init_state(source, max_length=5, segment_ids=ids)
        first, state = model.decoder(target[:, :2], state)
        return padded, jnp.concatenate([first, model.decoder(target[:, 2:], state)[0]], axis=1)

    @nnx.jit
    def alone(model, source, target):
        """The decoder on one sequence without a state: what the encoder makes of the source, and the tokens of the target."""
        x = model.encode(source).x
        whole = jnp.concatenate([x, model.decoder.embedding(target)[0]], axis=1)
        y = model.decoder.norm(model.decoder.stack(whole)[0][:, x.shape[1] :])
        return y @ model.decoder.embedding.table[...].T

    padded, stepped = run(model, source, target, jnp.asarray(SOURCE_IDS))
    for row, real in enumerate(SOURCE_IDS == 1):
        want = alone(model, source[row : row + 1, real], target[row : row + 1])[0]
        np.testing.assert_allclose(padded[row], want, atol=2e-5)
        np.testing.assert_allclose(stepped[row], want, atol=2e-5)
