"""Policies of caches written out for one row in NumPy, float64, one head and one token after the other."""

import numpy as np


def weights(q, k, seen):
    """Weights (h, t, s) of queries (t, h, k) and keys (s, g, k); `seen` (t, s)."""
    each = q.shape[1] // k.shape[1]
    found = np.zeros((q.shape[1], *seen.shape))
    for head in range(q.shape[1]):
        for i in range(len(q)):
            logits = k[:, head // each] @ q[i, head] / np.sqrt(q.shape[2])
            powers = np.where(seen[i], np.exp(logits - logits[seen[i]].max()), 0.0)
            found[head, i] = powers / powers.sum()
    return found


def causal(q, k):
    """Weights of a whole prompt."""
    return weights(q, k, np.tri(len(q), dtype=bool))


def by_group(x, groups):
    """Means over the query heads of each key/value head."""
    return np.stack([part.mean(0) for part in np.split(x, groups)])


def largest(scores, count, among):
    """The `count` of the tokens `among` with the largest scores; of equal ones the earlier."""
    order = sorted(among, key=lambda j: (-scores[j], j))
    return sorted(order[:count])


def pooled(x, kernel, how):
    """Means or maxima over neighbours, with zeros beyond the ends."""
    half = kernel // 2
    padded = np.concatenate([np.zeros(half), x, np.zeros(half)])
    found = [padded[j : j + kernel] for j in range(len(x))]
    return np.array([part.mean() if how == "mean" else part.max() for part in found])


def snapkv(policy, q, k):
    """Tokens of the prompt that each key/value head keeps."""
    t, window = len(q), min(policy.window, len(q))
    mass = by_group(causal(q, k)[:, t - window :].sum(1), k.shape[1])
    kept = []
    for head in mass:
        scores = pooled(head[: t - window], policy.kernel, policy.pooling)
        old = largest(scores, policy.budget - policy.window, range(t - window))
        kept.append([*old, *range(t - window, t)])
    return kept


def heavy(scores, tokens, budget, recent, now):
    """The last `recent` of the tokens, and of the others those of the largest scores."""
    last = [j for j in tokens if j > now - recent]
    return sorted(largest(scores, budget - len(last), [j for j in tokens if j not in last]) + last)


def h2o(policy, q, k):
    """Tokens of the prompt that each key/value head keeps, and the attention that all have received (g, t)."""
    mass = by_group(causal(q, k).sum(1), k.shape[1])
    now = len(q) - 1
    return [heavy(head, range(len(q)), policy.budget, policy.last, now) for head in mass], mass


def outputs(q, k, v, kept):
    """The output (h, v) of one query (h, k) whose key/value heads see the tokens `kept`, and the weights of each head."""
    each = q.shape[0] // k.shape[1]
    found, given = [], []
    for head in range(q.shape[0]):
        tokens, g = kept[head // each], head // each
        p = weights(q[None, head : head + 1], k[tokens, g : g + 1], np.ones((1, len(tokens)), bool))[0, 0]
        found.append(p @ v[tokens, g])
        given.append(p)
    return np.stack(found), given
