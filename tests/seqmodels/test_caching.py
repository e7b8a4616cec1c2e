"""Policies of caches in whole models: a budget that holds all tokens changes nothing, and only layers with a cache change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import seqmodels
from experiments.analysis.in_chunks import in_chunks
from experiments.analysis.positions import losses_by_position
from layers.caches import read_cache
from layers.caches.attention_gate import AttentionGate
from layers.caches.trained import Trained
from layers.mixer import MixerState
from seqmodels import caching, generation, prepacking
from tests.layers.caches import literal

VOCAB = 13
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, VOCAB, length).tolist() for length in (11, 5, 1)]
NEW, TOTAL = 5, 15
# Gates that are open to every token.
OPEN = {name: np.zeros((32, 1, 2)) for name in ("query", "key", "value")} | dict(
    output=np.zeros((1, 2, 2)), bias=np.ones(2)
)
# Each holds all tokens of all rows.
FULL = {
    "attention_gate": AttentionGate(gates=Trained([OPEN, OPEN]), budget=TOTAL, chunk=6),
    "snapkv": f"snapkv(budget={TOTAL}, window=4)",
    "h2o": f"h2o(budget={TOTAL})",
    "keyformer": f"keyformer(budget={TOTAL})",
    "streaming": f"streaming(budget={TOTAL})",
    "pyramidkv": f"pyramidkv(budget={TOTAL}, window=4)",
    "cake": f"cake(budget={TOTAL}, window=4)",
    "headkv": f"headkv(importance=[[1, 1], [1, 1]], budget={TOTAL}, window=4)",
    "duoattention": "duoattention(gates=[[0.1, 0.9], [0.2, 0.4]], sinks=2, recent=13)",
    "kivi": "kivi(group=4, residual=16)",
    "full": "full",
    "gemfilter": f"gemfilter(budget={TOTAL}, layer=2)",
    "hydragen": "hydragen",
    "kvmerger": "kvmerger(recent=11)",
    "mikv": f"mikv(budget={TOTAL})",
    "sirllm": f"sirllm(budget={TOTAL}, sinks=2, recent=4)",
    "think": "think(recent=11)",
    "hip": "hip(budget=14, window=1, queries=2, block=2)",
    "minference": "minference(verticals=1, slashes=15, block=2, window=2, first=1, near=1)",
    "lean": "lean(units=3, tile=4)",
    "cskv": "cskv(keys=1.0, values=1.0, window=3)",
    "taskkv": "taskkv(whole=0.5, sinks=2, recent=4, middle=9)",
    "recycled": f"recycled(budget={TOTAL}, stride=3)",
    "squeezed": "squeezed(sparsity=0.0, clusters=0.5, window=2)",
    "longheads": f"longheads(budget={TOTAL}, chunk=3)",
    "lserve": "lserve(gates=[[0.1, 0.9], [0.2, 0.4]], sinks=2, recent=13, budget=12, page=4, logical=2)",
    "infllm": "infllm(budget=12, window=3, sinks=1, unit=2, representatives=1, distance=true)",
    "shadowkv": "shadowkv(budget=14, rank=8, chunk=2, outliers=0, local=0)",
    "unlimiformer": f"unlimiformer(budget={TOTAL})",
    "sale": "sale(threshold=0.0, window=1, sinks=1, queries=2, block=2)",
    "moa": "moa(alphas=[[0, 0], [0, 0]], betas=[[1, 1], [1, 1]], sinks=2, least=3)",
    "tokenselect": f"tokenselect(budget={TOTAL}, sinks=1, recent=2)",
}


@functools.cache
def hybrid(**options):
    model = seqmodels.build_model(
        dict(
            kind="language_model",
            vocab_size=VOCAB,
            width=16,
            channel="none",
            tie_embeddings=False,
            depth=3,
            pattern=("attention", "lru", "attention"),
            mixers={"lru": dict(state_size=4), "attention": dict(heads=4, kv_heads=2) | options},
        ),
        rngs=nnx.Rngs(0),
    )
    # Logits of an untrained model are nearly equal; these tell tokens apart.
    model.head.kernel[...] = 8 * model.head.kernel[...]
    return model


@functools.cache
def transformer():
    config = dict(kind="language_model", vocab_size=VOCAB, width=16, channel="none", tie_embeddings=False)
    stack = dict(depth=2, pattern=("attention",), mixers={"attention": dict(heads=4, kv_heads=2)})
    learned = dict(absolute_positions="learned", max_positions=32)
    model = seqmodels.build_model(config | stack | learned, rngs=nnx.Rngs(0))
    model.head.kernel[...] = 8 * model.head.kernel[...]
    return model


def generated(cache, **options):
    settings = dict(max_new_tokens=NEW, temperature=0, chunk=16, block=8)
    return seqmodels.generate(hybrid(**options), PROMPTS, cache=cache, **settings)


@functools.cache
def plain(**options):
    return generated(None, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_a_budget_of_all_tokens_changes_nothing(name):
    found = generated(FULL[name])
    assert found.tokens.tolist() == plain().tokens.tolist()
    np.testing.assert_allclose(found.log_probabilities, plain().log_probabilities, atol=1e-5)


# Policies that tell rows' positions and segments apart by themselves.
PACKED = [
    "recycled",
    "squeezed",
    "longheads",
    "lserve",
    "infllm",
    "shadowkv",
    "cskv",
    "lean",
    "minference",
    "hip",
    "sale",
    "moa",
    "unlimiformer",
    "attention_gate",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKED)
def test_packed_rows(name):
    """Segments begin and end within the half of a row that is its prompt, within the other, and across."""
    tokens = RNG.integers(0, VOCAB, (2, 16)).astype(np.int32)
    ids = np.array([[1] * 3 + [2] * 8 + [3] * 4 + [0], [1] * 8 + [2] * 6 + [3] * 2], np.int32)
    batch = dict(inputs=tokens[:, :-1], labels=tokens[:, 1:], segment_ids=ids[:, :-1])
    wanted = hybrid()(jnp.asarray(batch["inputs"]), segment_ids=jnp.asarray(batch["segment_ids"]))[0]
    found = in_chunks(
        hybrid(), batch, lambda outputs, _: outputs.logits, chunk=4, cache=read_cache(FULL[name])
    )
    found = np.concatenate([logits for _, logits in found], axis=1)
    real = batch["segment_ids"] != 0
    np.testing.assert_allclose(found[real], wanted[real], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("position", ["none", "alibi", "t5", "fire"])
@pytest.mark.parametrize(
    "name", ["snapkv", "h2o", "streaming", "duoattention", "kivi", "infllm", "lserve", "shadowkv", "moa"]
)
def test_other_positions(name, position):
    found, wanted = generated(FULL[name], position=position), plain(position=position)
    assert found.tokens.tolist() == wanted.tokens.tolist()
    np.testing.assert_allclose(found.log_probabilities, wanted.log_probabilities, atol=1e-5)


@pytest.mark.slow
def test_options_of_attention():
    options = dict(sink_logits=True, logit_cap=5.0, qk_norm=True, scale=0.7)
    for name in ("snapkv", "h2o", "duoattention", "lean", "infllm", "shadowkv"):
        wanted = plain(**options).log_probabilities
        np.testing.assert_allclose(generated(FULL[name], **options).log_probabilities, wanted, atol=1e-5)


def test_only_layers_with_a_cache_change():
    model, policy = hybrid(), read_cache("snapkv(budget=6, window=2)")
    begun = jax.eval_shape(lambda: caching.begin(model, policy, 2, 12))
    whole = jax.eval_shape(lambda: model.init_state(2, max_length=12))
    assert list(caching.layers_of(model)) == [0, 2]
    assert begun.layers[1] == whole.layers[1]
    kept = jax.eval_shape(
        lambda: caching.compress(model, caching.begin(model, policy, 2, 12), policy=policy, room=3, call=1)
    )
    assert kept.layers[1] == whole.layers[1]
    assert [kept.layers[layer].carried.keys.shape for layer in (0, 2)] == [(2, 9, 2, 4)] * 2


def test_a_state_of_a_policy_is_checked():
    model, policy = hybrid(), read_cache("snapkv(budget=6, window=2)")
    state = jax.eval_shape(lambda: caching.begin(model, policy, 2, 12))
    tokens = jax.ShapeDtypeStruct((2, 1), "int32")
    jax.eval_shape(model, tokens, state)
    lru, attention = state.layers[1], state.layers[0]
    wrong = state._replace(layers=(attention, MixerState(attention.carried, lru.place), attention))
    with pytest.raises(ValueError, match="state of LRU is that of another mixer"):
        jax.eval_shape(model, tokens, wrong)
    with pytest.raises(
        ValueError, match=r"state.place.segment of Attention has shape \(2,\); expected \(3,\)"
    ):
        jax.eval_shape(model, jax.ShapeDtypeStruct((3, 1), "int32"), state)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["h2o", "snapkv", "streaming"])
def test_losses_by_position(name):
    tokens = RNG.integers(0, VOCAB, (2, 16)).astype(np.int32)
    wanted = losses_by_position(hybrid(), tokens[:, :-1], tokens[:, 1:], chunk=4)
    found = losses_by_position(hybrid(), tokens[:, :-1], tokens[:, 1:], chunk=4, cache=read_cache(FULL[name]))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    small = read_cache(FULL[name].replace("15", "5"))
    found = losses_by_position(hybrid(), tokens[:, :-1], tokens[:, 1:], chunk=4, cache=small)
    assert np.isfinite(found).all()
    assert np.abs(found - wanted).max() > 1e-3


@pytest.mark.slow
def test_rows_share_what_their_prompts_begin_with():
    prompts = [[*PROMPTS[0][:6], *more] for more in ([1, 2, 3], [4], [5, 6, 7, 8])]
    settings = dict(max_new_tokens=NEW, temperature=0, chunk=4, block=8)
    wanted = seqmodels.generate(hybrid(), prompts, **settings)
    found = seqmodels.generate(hybrid(), prompts, cache="hydragen", **settings)
    assert found.tokens.tolist() == wanted.tokens.tolist()
    np.testing.assert_allclose(found.log_probabilities, wanted.log_probabilities, atol=1e-5)
    rows, _ = generation.prefill(hybrid(), list(map(np.asarray, prompts)), NEW, 4, read_cache("hydragen"))
    assert rows.state.layers[0].carried.keys.shape == (1, 6, 2, 4)


@pytest.mark.slow
def test_prompts_are_read_side_by_side():
    model = transformer()
    prompts = [RNG.integers(0, VOCAB, length).tolist() for length in (9, 4, 1, 6, 3)]
    packed = prepacking.pack([np.asarray(prompt) for prompt in prompts])
    assert packed.ids.tolist() == [[1] * 8, [1] * 5 + [2] * 3, [1] * 2 + [0] * 6]
    settings = dict(max_new_tokens=NEW, temperature=0, chunk=4, block=8)
    wanted = seqmodels.generate(model, prompts, **settings)
    found = seqmodels.generate(model, prompts, cache="prepacking", **settings)
    assert found.tokens.tolist() == wanted.tokens.tolist()
    np.testing.assert_allclose(found.log_probabilities, wanted.log_probabilities, atol=1e-5)


@pytest.mark.slow
def test_the_surprise_of_prompts_is_that_of_whole_rows():
    given = [np.asarray(prompt, np.int32) for prompt in PROMPTS[:2]]
    _, found = generation.prefill(hybrid(), given, NEW, 4, read_cache("sirllm(budget=3, sinks=1, recent=1)"))
    assert found[:, 0].tolist() == [0, 0]
    for row, prompt in enumerate(given):
        logits, _ = hybrid()(jnp.asarray(prompt)[None])
        wanted = -jax.nn.log_softmax(logits[0, :-1])[np.arange(len(prompt) - 1), prompt[1:]]
        np.testing.assert_allclose(found[row, 1 : len(prompt)], wanted, atol=1e-4)


@pytest.mark.slow
def test_a_filter_leaves_what_its_layer_chooses():
    """The new prompt, from products of the last query and the keys of a layer in NumPy, is continued as any prompt is."""
    model, policy = hybrid(), read_cache("gemfilter(budget=4, layer=2, kernel=5)")
    shorter, pooling_matters = [], []
    for prompt in PROMPTS:
        x, _ = model.embedding(jnp.asarray(prompt)[None], None, segment_ids=None)
        for layer in range(2):
            x = model.stack.block(layer)(x, None)[0]
        block = model.stack.block(2)
        q, k, _ = block.mixer.project(block.mixer_norm(x), jnp.arange(len(prompt))[None], None)
        q, k = (np.asarray(one[0], np.float64) for one in (q, k))
        products = np.array([sum(q[-1, h] @ one[h // 2] for h in range(4)) for one in k])
        wanted = literal.largest(literal.pooled(products, 5, "mean"), 4, range(len(prompt)))
        pooling_matters.append(literal.largest(products, 4, range(len(prompt))) != wanted)
        shorter.append([prompt[j] for j in wanted])
    assert [len(prompt) for prompt in shorter] == [4, 4, 1]
    assert any(pooling_matters)
    given = [np.asarray(prompt, np.int32) for prompt in PROMPTS]
    assert [one.tolist() for one in generation.filtered(model, given, 4, policy)] == shorter
    settings = dict(max_new_tokens=NEW, temperature=0, chunk=4, block=8)
    found = seqmodels.generate(model, PROMPTS, cache=policy, **settings)
    assert found.tokens.tolist() == seqmodels.generate(model, shorter, **settings).tokens.tolist()
