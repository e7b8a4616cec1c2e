"""Policies that read prompts sparsely against NumPy, and the search of the patterns of MInference."""

import json
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest

from layers.caches import read_cache
from layers.caches.minference import MInference
from seqmodels.sparse_prefill import search
from tests.layers.caches import literal, literal_selection
from tests.layers.caches.reading import HEADS, LENGTHS, PROMPT, STEPS, given, output, projected
from tests.seqmodels.test_caching import VOCAB, hybrid

PATTERNS = [("a_shape", 1, 4), ("vertical_slash", 4, 3), ("block_sparse", 2, 0), ("vertical_slash", 2, 5)]


@pytest.mark.slow
def test_heads_read_along_their_patterns(tmp_path):
    (tmp_path / "heads.json").write_text(json.dumps([PATTERNS]))
    policy = read_cache(f"minference(heads='{tmp_path / 'heads.json'}', block=3, window=4, first=1, near=2)")
    y, outputs, *_ = given(policy)
    short = 0
    for row, length in enumerate(LENGTHS):
        q, k, v = projected(row)
        read = [
            literal_selection.minference(policy, pattern, q[:length, h], k[:length, h // 2])
            for h, pattern in enumerate(PATTERNS)
        ]
        for now in range(length + STEPS):
            o = np.zeros((HEADS, v.shape[2]))
            for h in range(HEADS):
                # New tokens read everything.
                tokens = read[h][now] if now < length else range(now + 1)
                short += len(tokens) < now
                o[h] = literal.joined([(q[now, h], k[tokens, h // 2], v[tokens, h // 2])], q.shape[2] ** -0.5)
            got = y[row, PROMPT - length + now] if now < length else outputs[row, now - length]
            np.testing.assert_allclose(got, output(o), atol=1e-5)
    assert short > 40


@pytest.mark.slow
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize(
    "text",
    [
        "hip(budget=2, window=3, queries=2, block=1)",
        "sale(threshold=1.0, window=1, sinks=1, queries=3, block=2)",
        "sale(threshold=0.02, window=1, sinks=1, queries=2, block=1, budget=6)",
    ],
)
def test_blocks_of_queries_choose_blocks_of_keys(text, calls):
    policy = read_cache(text)
    chosen = getattr(literal_selection, text.partition("(")[0])
    y, outputs, *_ = given(policy, calls=calls)
    size, short, counts = -(-PROMPT // calls), 0, set()
    for row, length in enumerate(LENGTHS):
        q, k, v = projected(row)
        begun = PROMPT - length
        # Positions at which calls begin and end.
        ends = [max(0, min(PROMPT, call * size) - begun) for call in range(calls + 1)]
        read = [
            [one for pair in pairwise(ends) for one in chosen(policy, q[:, h], k[:, h // 2], *pair)]
            for h in range(HEADS)
        ]
        for now in range(length + STEPS):
            o = np.zeros((HEADS, v.shape[2]))
            for h in range(HEADS):
                tokens = read[h][now] if now < length else range(now + 1)
                short += len(tokens) < now
                counts.add(len(tokens))
                o[h] = literal.joined([(q[now, h], k[tokens, h // 2], v[tokens, h // 2])], q.shape[2] ** -0.5)
            got = y[row, begun + now] if now < length else outputs[row, now - length]
            np.testing.assert_allclose(got, output(o), atol=1e-5)
    assert short > 40
    assert len(counts) > 5


@pytest.mark.slow
def test_the_search_takes_the_pattern_that_keeps_most():
    model, tokens = hybrid(), np.random.default_rng(0).integers(0, VOCAB, (2, 12)).astype(np.int32)
    policy = MInference(block=2, window=4, first=1, near=1)
    candidates = [("a_shape", 1, 3), ("vertical_slash", 3, 2), ("block_sparse", 2, 0)]
    found = search(model, tokens, candidates=candidates, policy=policy, skip=4)
    assert [len(layer) for layer in found] == [4, 4]
    mixer, recalls = model.stack.block(0), np.zeros((3, 4))
    for row in tokens:
        x, _ = model.embedding(jnp.asarray(row)[None], None, segment_ids=None)
        q, k, _ = (
            np.asarray(x[0], np.float64)
            for x in mixer.mixer.project(mixer.mixer_norm(x), jnp.arange(12)[None], None)
        )
        weights = literal.causal(q, k)
        for h in range(4):
            for number, pattern in enumerate(candidates):
                read = literal_selection.minference(policy, pattern, q[:, h], k[:, h // 2])
                recalls[number, h] += sum(weights[h, i, read[i]].sum() for i in range(4, 12))
    assert found[0] == [candidates[best] for best in recalls.argmax(0)]
    assert json.loads(json.dumps(found)) == [[list(one) for one in layer] for layer in found]
    assert MInference(heads=json.loads(json.dumps(found))).heads == tuple(map(tuple, found))
