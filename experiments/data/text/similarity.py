"""An order of documents in which neighbours are similar, for in-context pretraining (Shi et al. 2024, arXiv:2310.10638).

Documents that follow each other in a row see each other, so that a model can use one to predict the next. The paper finds
neighbours by embeddings; here they are documents that share n-grams, found by MinHash (Broder 1997) with one permutation (Li, Owen
and Zhang 2012): n-grams are hashed into 64 bins, and the least hash of each bin is kept. The share of equal bins estimates
the Jaccard similarity of two sets of n-grams.

The order is a path: from a document to the most similar one of its neighbours that is not on the path yet. Where there is none,
the path begins again at the document with the fewest neighbours, as those are reached from nowhere later on.
"""

import numpy as np

from experiments.data.sequences import Sequences

BINS = 64
NEIGHBOURS = 9  # most per document
REACH = 2  # documents on each side, among those of equal hash in a bin, that are compared
SPAN = 8  # bytes of an n-gram, about
AT_ONCE = 2**22  # number of tokens that are hashed in one call
EMPTY = np.uint64(2**64 - 1)
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio


def similar_order(documents: Sequences, *, ngram: int) -> np.ndarray:
    """Returns the numbers of the documents in an order in which neighbours are similar; equal documents give equal orders.

    Args:
      ngram: number of tokens by which documents are compared.
    """
    return _path(*_neighbours(signatures(documents, ngram=ngram)), len(documents))


def signatures(documents: Sequences, *, ngram: int) -> np.ndarray:
    """Returns the least hash per bin of the n-grams of each document, uint64 (n, BINS); EMPTY if a bin has none."""
    found = np.full((len(documents), BINS), EMPTY)
    start = 0
    while start < len(documents):
        stop = int(np.searchsorted(documents.offsets, documents.offsets[start] + AT_ONCE, "right")) - 1
        stop = max(start + 1, stop)
        lengths = documents.lengths[start:stop]
        tokens = documents.tokens[documents.offsets[start] : documents.offsets[stop]].astype(np.uint64)
        document = np.repeat(np.arange(start, stop), lengths)
        hashes = np.zeros(max(0, len(tokens) - ngram + 1), np.uint64)
        for place in range(ngram):
            hashes = _mixed(hashes + tokens[place : place + len(hashes)] + np.uint64(1))
        # A document that is shorter than an n-gram has none.
        inside = document[: len(hashes)] == document[ngram - 1 : ngram - 1 + len(hashes)]
        hashes, document = hashes[inside], document[: len(inside)][inside]
        np.minimum.at(
            found, (document, (hashes % np.uint64(BINS)).astype(np.int64)), hashes // np.uint64(BINS)
        )
        start = stop
    return found


def similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns the numbers of bins, out of those that one of two documents has, that are equal, as a share."""
    known = (first != EMPTY) | (second != EMPTY)
    return ((first == second) & known).sum(-1) / np.maximum(known.sum(-1), 1)


def _mixed(hashes: np.ndarray) -> np.ndarray:
    hashes = hashes * MULTIPLIER  # modulo 2^64
    return hashes ^ (hashes >> np.uint64(29))


def _neighbours(signed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns pairs of different documents that share a bin, the most similar first per document: first and second."""
    pairs = [np.zeros((0, 2), np.int64)]
    for column in signed.T:
        order = np.argsort(column, kind="stable")
        for reach in range(1, REACH + 1):
            equal = (column[order[:-reach]] == column[order[reach:]]) & (column[order[reach:]] != EMPTY)
            pairs.append(np.stack([order[:-reach][equal], order[reach:][equal]], axis=1))
    both = np.concatenate(pairs)
    both = np.unique(np.concatenate([both, both[:, ::-1]]), axis=0)
    share = np.concatenate([similarity(signed[part[:, 0]], signed[part[:, 1]]) for part in _parts(both)])
    order = np.lexsort((both[:, 1], -share, both[:, 0]))
    first, second = both[order].T
    rank = np.arange(len(first)) - np.searchsorted(first, first)
    return first[rank < NEIGHBOURS], second[rank < NEIGHBOURS]


def _parts(pairs: np.ndarray) -> list[np.ndarray]:
    return np.array_split(pairs, max(1, -(-len(pairs) * BINS // AT_ONCE)))


def _path(first: np.ndarray, second: np.ndarray, count: int) -> np.ndarray:
    """Returns the path through all documents."""
    bounds = np.searchsorted(first, np.arange(count + 1)).tolist()
    starts = np.argsort(np.diff(bounds), kind="stable").tolist()
    second, seen, path = second.tolist(), bytearray(count), []
    for start in starts:
        at: int | None = None if seen[start] else start
        while at is not None:
            seen[at] = True
            path.append(at)
            near = second[bounds[at] : bounds[at + 1]]
            at = next((other for other in near if not seen[other]), None)
    return np.array(path, np.int64)
