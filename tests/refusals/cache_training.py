"""What is trained or searched for policies of caches, on rows or models that do not fit."""

import numpy as np

from experiments.training.gating import train_gates
from experiments.training.retaining import train_heads
from seqmodels import spans
from seqmodels.sparse_prefill import search
from tests.refusals.caches import LRU
from tests.refusals.models import model

ROWS = [
    (
        lambda: train_heads(model()(), np.ones((2, 4), np.int32), prompt=4),
        ValueError,
        "prompt=4 in tokens [2, 4]; expected rows (n, t) with a prompt and an answer",
    ),
    (
        lambda: train_heads(model(**LRU)(), np.ones((2, 4), np.int32), prompt=2),
        ValueError,
        "model: no layer (lru) holds keys",
    ),
    (
        lambda: train_gates(model()(), np.ones((0, 4), np.int32)),
        ValueError,
        "tokens [0, 4]; expected one or more rows (n, t)",
    ),
    (lambda: train_gates(model()(), np.ones((1, 4))), TypeError, "tokens are float64; expected integers"),
    (
        lambda: train_gates(model()(), np.full((1, 4), 9)),
        ValueError,
        "tokens[0, 0] is 9; expected 0 to 8, as vocab_size=9",
    ),
    (
        lambda: train_heads(model()(), np.ones((0, 4), np.int32), prompt=2),
        ValueError,
        "tokens [0, 4]; expected one or more rows (n, t)",
    ),
    (
        lambda: search(model()(), np.full((1, 4), -1)),
        ValueError,
        "tokens[0, 0] is -1; expected 0 to 8, as vocab_size=9",
    ),
    (
        lambda: spans.search(model()(), np.ones((0, 4), np.int32)),
        ValueError,
        "tokens [0, 4]; expected one or more rows (n, t)",
    ),
    (
        lambda: spans.search(model()(), np.ones((1, 4), np.int32), rules=[(1, 0.0), (2,)]),
        ValueError,
        "rules=[(1, 0.0), (2,)]; expected one or more pairs (alpha, beta)",
    ),
    (
        lambda: spans.search(model()(), np.ones((1, 4), np.int32), rules=[("all", 0.0)]),
        TypeError,
        "alpha of rules[0]='all'; expected a number",
    ),
    (
        lambda: train_gates(model()(), np.ones((2, 1), np.int32)),
        ValueError,
        "tokens [2, 1]; expected one or more rows (n, t) with t of at least 2",
    ),
    (
        lambda: train_gates(model(**LRU)(), np.ones((2, 4), np.int32)),
        ValueError,
        "model: no layer (lru) holds keys",
    ),
    (
        lambda: search(model()(), np.ones((2, 4), np.int32), skip=4),
        ValueError,
        "skip=4 in tokens [2, 4]; expected rows (n, t) and 0 <= skip < t",
    ),
    (
        lambda: spans.search(model()(), np.ones((2, 1), np.int32)),
        ValueError,
        "tokens [2, 1]; expected one or more rows (n, t) with t of at least 2",
    ),
    (
        lambda: spans.search(model()(), np.ones((2, 4), np.int32), density=0.0),
        ValueError,
        "density=0.0; expected more than 0 and at most 1",
    ),
    (
        lambda: spans.search(model(**LRU)(), np.ones((2, 4), np.int32)),
        ValueError,
        "model: no layer (lru) holds keys",
    ),
    (
        lambda: spans.choose(np.zeros((2, 1)), np.array([4]), 6),
        ValueError,
        "rules of 4 tokens at least for each of 2 heads, which may see 6 together; expected a larger density",
    ),
]
