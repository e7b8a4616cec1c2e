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


def keyformer(policy, noise, q, k):
    """The scores of the tokens of a prompt (g, t), with the noise (h, t, t)."""
    t, each = len(q), q.shape[1] // k.shape[1]
    found = np.zeros((q.shape[1], t))
    for head in range(q.shape[1]):
        for i in range(t):
            found[head, : i + 1] += tempered(
                q[i, head], k[: i + 1, head // each], noise[head, i, : i + 1], policy.tau
            )
    return by_group(found, k.shape[1])


def tempered(q, k, noise, tau):
    """Weights of one query over keys (s, k) with noise, at a temperature."""
    powers = np.exp((k @ q / np.sqrt(len(q)) + noise) / tau)
    return powers / powers.sum()


def pyramid(budget, window, beta, layers, length):
    """Tokens that the heads of each layer keep."""
    mean = budget - window
    least = int(mean // beta)
    most = mean * 2 - least
    if most >= length - window > mean:
        most = length - window
        least = mean * 2 - most
    if length - window <= mean:
        most = least = mean
    step = (most - least) // (layers - 1)
    return [most - layer * step + window for layer in range(layers)]


def cake(budget, window, gamma, attention):
    """Tokens that each layer keeps, and the scores before pooling (g, t - window), from weights (h, window, t - window)."""
    preferred, scores = [], []
    for a in attention:
        entropy = -np.sum(a * np.log(a + 1e-10))
        change = np.sum(np.var(a, axis=1, ddof=1))
        preferred.append(entropy * change)
        scores.append(a.mean(1) + gamma * a.var(1, ddof=1))
    total, before = (budget - window) * len(attention), attention[0].shape[2]
    wanted = [int(p / sum(preferred) * total) for p in preferred]
    given = [min(n, before) for n in wanted]
    below = [n < before for n in wanted]
    spare = (sum(wanted) - sum(given)) // max(1, sum(below))
    return [min(n + spare * free, before) + window for n, free in zip(given, below, strict=True)], scores


def rounded(x, bits):
    """Numbers of one group rounded between the smallest and the largest."""
    least, most = x.min(), x.max()
    step = (most - least) / (2**bits - 1)
    return least + step * np.round((x - least) / step)


def kivi(policy, k, v):
    """Keys and values (t, g, k) as the cache reads them after its newest token."""
    t, (k, v) = len(k), (k.copy(), v.copy())
    for start in range(0, t // policy.residual * policy.residual, policy.group):
        for g, channel in np.ndindex(k.shape[1:]):
            k[start : start + policy.group, g, channel] = rounded(
                k[start : start + policy.group, g, channel], policy.bits
            )
    for token in range(max(0, t - policy.residual)):
        for g in range(v.shape[1]):
            for start in range(0, v.shape[2], policy.group):
                v[token, g, start : start + policy.group] = rounded(
                    v[token, g, start : start + policy.group], policy.bits
                )
    return k, v


def joined(parts, scale):
    """The output of one query over parts (query, keys, values), as one softmax."""
    logits = np.concatenate([scale * keys @ query for query, keys, _ in parts])
    powers = np.exp(logits - logits.max())
    return powers / powers.sum() @ np.concatenate([values for *_, values in parts])


def think(policy, q, k):
    """The channels of keys that a key/value head keeps, from its queries (t, heads, k) and keys (t, k)."""
    scores = []
    for channel in range(k.shape[1]):
        read = np.mean(q[-policy.window :, :, channel] ** 2)
        scores.append(read * np.mean(k[:, channel] ** 2))
    order = sorted(range(k.shape[1]), key=lambda channel: (-scores[channel], channel))
    return sorted(order[: k.shape[1] - int(policy.ratio * k.shape[1])])


def by_channel(x, bits):
    """Numbers (n, channels) rounded by channel."""
    return np.stack([rounded(column, bits) for column in x.T], axis=1)


def by_token(x, bits):
    """Numbers (n, channels) rounded by token."""
    return np.stack([rounded(one, bits) for one in x])


def saliency(q, k, probes):
    """Attention that tokens receive from probes, divided by the probes that see them, (g, t)."""
    p, t = causal(q, k), len(q)
    found = np.zeros((q.shape[1], t))
    for j in range(t):
        found[:, j] = p[:, probes, j].sum(1) / sum(i >= j for i in probes)
    return by_group(found, k.shape[1])


def votes(policy, q, k):
    """The tokens that the last query (h, k) reads of keys (t, g, k)."""
    t, total = len(k), 0.0
    for head in range(len(q)):
        total = total + tempered(q[head], k[:, head // (len(q) // k.shape[1])], 0.0, 1.0)
    middle = range(policy.sinks, max(policy.sinks, t - policy.recent))
    return sorted(
        {
            *largest(total, policy.budget, middle),
            *range(min(policy.sinks, t)),
            *range(max(0, t - policy.recent), t),
        }
    )


def merged(policy, mass, k, v):
    """The entries (k, v, size, pivot) that tokens with keys (t, k) and values (t, v) become."""
    t, sets = len(k), []
    for j in range(t):
        cosine = k[j] @ k[j - 1] / np.linalg.norm(k[j]) / np.linalg.norm(k[j - 1])
        if j > 0 and j < t - policy.recent and cosine > policy.threshold:
            sets[-1].append(j)
        else:
            sets.append([j])
    found = []
    for one in sets:
        pivot = max(one, key=lambda j: (mass[j], -j))
        distance = np.linalg.norm(k[one] - k[pivot], axis=1)
        sigma = distance.mean()
        w = np.exp(-(distance**2) / (2 * sigma**2)) if sigma > 0 else np.ones(len(one))
        found.append((w @ k[one] / w.sum(), w @ v[one] / w.sum(), len(one), pivot))
    return found
