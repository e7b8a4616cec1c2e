"""LazyLLM: the tokens that each layer reads and the logits, against the definition in NumPy, and all tokens against the model."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels import LazyLLMConfig, build_model, lazy_read, lazy_state
from tests.layers.mixers.literal import apply, filled, masked_softmax, rms, silu, wide

WIDTH, HEADS, GROUPS, PROMPT, MORE = 8, 4, 2, 9, 4
TOKENS = np.random.default_rng(0).integers(0, 7, (2, PROMPT + MORE))
MODEL = dict(
    kind="language_model",
    vocab_size=7,
    width=WIDTH,
    depth=3,
    pattern=("attention+swiglu",),
    mixers={"attention": dict(heads=HEADS, kv_heads=GROUPS, position="alibi")},
    channels={"swiglu": dict(hidden=5)},
)
CONFIG = LazyLLMConfig(layers=(0, 1), keep=(0.6, 0.35))


@pytest.fixture(scope="module")
def model():
    """Scores that depend on the tokens more than on their distances."""
    model = filled(lambda: build_model(MODEL | dict(scan=False), rngs=nnx.Rngs(0)))
    for block in model.stack.layers:
        block.mixer.query.kernel[...] *= 10
    return model


def norm(module, x):
    return rms(x, module.config.epsilon) * wide(module.scale)


class Literal:
    """One row: keys, values and inputs of each layer by position, as they are computed."""

    def __init__(self, model):
        self.model = model
        self.keys, self.values, self.inputs = ([{} for _ in range(3)] for _ in range(3))

    def run(self, block, layer, place, read):
        """The output of a token that sees the tokens of `read` up to itself, and its weights per head."""
        mixer = block.mixer
        seen = [j for j in read if j <= place]
        q = apply(mixer.query, norm(block.mixer_norm, self.inputs[layer][place])).reshape(HEADS, -1)
        heads, weights = [], []
        for h in range(HEADS):
            g, slope = h // (HEADS // GROUPS), 2.0 ** (-8 * (h + 1) / HEADS)
            logits = np.array(
                [q[h] @ self.keys[layer][j][g] / np.sqrt(q.shape[1]) - slope * (place - j) for j in seen]
            )
            weights.append(masked_softmax(logits, np.ones(len(seen), bool)))
            heads.append(sum(w * self.values[layer][j][g] for w, j in zip(weights[h], seen, strict=True)))
        x = self.inputs[layer][place] + apply(mixer.output, np.concatenate(heads))
        u, channel = norm(block.channel_norm, x), block.channel
        x = x + apply(channel.down, silu(apply(channel.gate, u)) * apply(channel.up, u))
        return x, dict(zip(seen, np.mean(weights, 0), strict=True))

    def call(self, tokens):
        """The logits after the last token, the tokens that each layer reads, and those that it computes."""
        start = len(self.inputs[0])
        for place, token in enumerate(tokens, start=start):
            self.inputs[0][place] = wide(self.model.embedding.table)[token]
        n = start + len(tokens)
        read, all_read, computed = list(range(n)), [], []
        for layer, block in enumerate(self.model.stack.layers):
            new = [j for j in read if j not in self.keys[layer]]
            for j in new:
                u = norm(block.mixer_norm, self.inputs[layer][j])
                self.keys[layer][j] = apply(block.mixer.key, u).reshape(GROUPS, -1)
                self.values[layer][j] = apply(block.mixer.value, u).reshape(GROUPS, -1)
            outputs = {j: self.run(block, layer, j, read) for j in new}
            if layer < 2:
                self.inputs[layer + 1] |= {j: x for j, (x, _) in outputs.items()}
            all_read.append(read)
            computed.append(new)
            x, score = outputs[n - 1]
            if layer in CONFIG.layers:
                count = int(np.ceil(CONFIG.keep[layer] * n))
                others = sorted(set(read) - {n - 1}, key=lambda j, score=score: -score[j])
                read = sorted([n - 1, *others[: count - 1]])
        return norm(self.model.norm, x) @ wide(self.model.embedding.table).T, all_read, computed


@pytest.mark.slow
def test_a_prompt_and_what_follows_equal_the_definition(model):
    literals, revived = [Literal(model) for _ in TOKENS], 0
    state = lazy_state(model, 2, PROMPT + MORE + 3)
    for start, end in [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, PROMPT + MORE))]:
        logits, state = lazy_read(model, TOKENS[:, start:end], state, CONFIG)
        for row, literal in enumerate(literals):
            want, read, computed = literal.call(TOKENS[row, start:end])
            for layer in range(3):
                assert np.flatnonzero(state.read[layer][row]).tolist() == read[layer]
                held = np.flatnonzero(np.asarray(state.caches[layer].held[row])).tolist()
                assert held == sorted(literal.keys[layer])
            np.testing.assert_allclose(logits[row], want, atol=1e-5)
            revived += sum(len(new) - (end - start) for new in computed if start)
    # Tokens that a call left out came back in a later one.
    assert revived > 0


@pytest.mark.parametrize("position", ["rope", pytest.param("alibi", marks=pytest.mark.slow)])
def test_with_all_tokens_it_is_the_model(position):
    mixers = {"attention": dict(heads=HEADS, kv_heads=GROUPS, position=position)}
    model = filled(lambda: build_model(MODEL | dict(mixers=mixers, depth=2), rngs=nnx.Rngs(0)))
    config, state = LazyLLMConfig(layers=(0,), keep=(1.0,)), lazy_state(model, 2, PROMPT + 1)
    want = model(jnp.asarray(TOKENS[:, : PROMPT + 1]))[0]
    for start, end in ((0, PROMPT), (PROMPT, PROMPT + 1)):
        logits, state = lazy_read(model, TOKENS[:, start:end], state, config)
        np.testing.assert_allclose(logits, want[:, end - 1], atol=1e-5)


def test_parts_are_of_all_tokens_so_far():
    config = LazyLLMConfig(layers=(2, 5), keep=(0.7, 0.1))
    assert [config.kept(layer, 30) for layer in (0, 2, 5)] == [None, 21, 3]
    assert config.kept(5, 1) == 1
