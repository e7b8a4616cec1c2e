"""Similar documents follow each other, each once, in an order that depends on the documents alone."""

import numpy as np

from experiments.data.sequences import Sequences
from experiments.data.text.similarity import BINS, EMPTY, signatures, similar_order, similarity


def sequences(parts):
    offsets = np.cumsum([0, *map(len, parts)])
    return Sequences(np.concatenate(parts).astype(np.uint8), offsets, np.zeros(len(parts)))


def topics(count=6, each=12, seed=0):
    """Documents of topics, which draw phrases from ten of their own; in random order with their topics."""
    rng = np.random.default_rng(seed)
    phrases = rng.integers(0, 200, (count, 10, 20))
    drawn = [
        (topic, np.concatenate(phrases[topic][rng.permutation(10)[:6]]))
        for topic in range(count)
        for _ in range(each)
    ]
    order = rng.permutation(len(drawn))
    return sequences([drawn[place][1] for place in order]), np.array([drawn[place][0] for place in order])


def test_documents_of_a_topic_follow_each_other():
    documents, topic = topics()
    order = similar_order(documents, ngram=4)
    assert sorted(order.tolist()) == list(range(len(documents)))
    changes = (topic[order][1:] != topic[order][:-1]).sum()
    assert changes < 12 < (topic[1:] != topic[:-1]).sum()
    np.testing.assert_array_equal(similar_order(topics()[0], ngram=4), order)


def test_the_most_similar_document_comes_next():
    """Pairs share most of their text, and all documents share a little."""
    rng = np.random.default_rng(2)
    common, parts = rng.integers(0, 200, 150), []
    for _ in range(8):
        own = rng.integers(0, 200, 400)
        parts += [np.concatenate([common, own]), np.concatenate([own, common, rng.integers(0, 200, 50)])]
    place = np.argsort(similar_order(sequences(parts), ngram=4))
    assert (abs(place[0::2] - place[1::2]) == 1).all()


def test_similarity_estimates_that_of_the_sets_of_n_grams():
    rng = np.random.default_rng(1)
    base = rng.integers(0, 250, 2000)
    for share in (0.2, 0.5, 0.9):
        other = np.concatenate([base[: int(2000 * share)], rng.integers(0, 250, int(2000 * (1 - share)))])
        sets = [{tuple(part[i : i + 3]) for i in range(len(part) - 2)} for part in (base, other)]
        exact = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        found = similarity(*signatures(sequences([base, other]), ngram=3))
        # The standard deviation of 64 bins is at most 1 / 16.
        assert abs(found - exact) < 0.19


def test_n_grams_end_with_their_document():
    parts = [np.arange(50), np.arange(3), np.arange(100, 150), np.array([7])]
    together = signatures(sequences(parts), ngram=4)
    for part, row in zip(parts, together, strict=True):
        np.testing.assert_array_equal(row, signatures(sequences([part]), ngram=4)[0])
    assert (together[[1, 3]] == EMPTY).all()
    assert together.shape == (4, BINS)
    assert sorted(similar_order(sequences(parts), ngram=4).tolist()) == [0, 1, 2, 3]
    assert similarity(together[1], together[3]) == 0
