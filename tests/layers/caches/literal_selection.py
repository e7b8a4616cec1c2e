"""Policies that choose what is read, written out for one row in NumPy, float64; see `literal`."""

from itertools import pairwise

import numpy as np

from tests.layers.caches.literal import largest, tempered


def recycled(policy, q, k, length):
    """The tokens that each key/value head reads at every step after a prompt of so many tokens."""
    groups, each = k.shape[1], q.shape[1] // k.shape[1]

    def chosen(i, g):
        heads = range(g * each, (g + 1) * each)
        weights = np.max([tempered(q[i, h], k[: i + 1, g], 0.0, 1.0) for h in heads], axis=0)
        return largest(weights, policy.budget, range(i + 1))

    found, last, kept = [], length - 1, [chosen(length - 1, g) for g in range(groups)]
    for i in range(length, len(q)):
        if (i - length + 1) % policy.stride == 0:
            last, kept = i, [chosen(i, g) for g in range(groups)]
            found.append([list(range(i + 1))] * groups)
        else:
            found.append([sorted({*one, *range(last + 1, i + 1)}) for one in kept])
    return found


def k_means(keys, number, iterations):
    """The cluster of each key, by steps on keys of norm 1 from keys at equal distances."""
    x = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    centres = x[[c * len(x) // number for c in range(number)]]
    for step in range(iterations + 1):
        labels = np.array([np.argmin([np.sum((one - c) ** 2) for c in centres]) for one in x])
        if step < iterations:
            centres = np.stack(
                [x[labels == c].mean(0) if (labels == c).any() else centres[c] for c in range(number)]
            )
    return labels


def squeezed(policy, q, k, length):
    """The tokens that each query head reads at every step after a prompt of so many tokens."""
    each, old = q.shape[1] // k.shape[1], max(0, length - policy.window)
    labels = [k_means(k[:old, g], int(policy.clusters * old), policy.iterations) for g in range(k.shape[1])]
    means = [np.stack([k[:old, g][one == c].mean(0) for c in set(one)]) for g, one in enumerate(labels)]
    names = [sorted(set(one)) for one in labels]

    def scores(i, h):
        """S of the cluster of each key."""
        g = h // each
        powers = np.exp(means[g] @ q[i, h] / np.sqrt(q.shape[2]))
        sizes = np.array([np.sum(labels[g] == c) for c in names[g]])
        by_name = dict(zip(names[g], powers / (sizes @ powers), strict=True))
        return np.array([by_name[c] for c in labels[g]])

    asked = range(old, length)
    threshold = np.quantile(
        [np.mean([scores(i, h) for i in asked], axis=0) for h in range(q.shape[1])], policy.sparsity
    )
    return [
        [[*np.flatnonzero(scores(i, h) >= threshold), *range(old, i + 1)] for h in range(q.shape[1])]
        for i in range(length, len(q))
    ]


def turned(x, positions, base=10_000.0):
    """Features (t, h, k) rotated by so many positions more, halves of the features as pairs."""
    half = x.shape[2] // 2
    angles = np.asarray(positions)[:, None] * base ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=2)


def longheads(policy, q, k, v, length):
    """The tokens that each query head reads at every step after a prompt of so many tokens."""
    size, each, heads = policy.chunk, q.shape[1] // k.shape[1], q.shape[1]
    count = -(-length // size)
    features = np.zeros((count, heads, q.shape[2]))
    for c in range(count):
        part = range(c * size, min((c + 1) * size, length))
        local = turned(k[part], [-c * size] * len(part))
        for h in range(heads):
            outputs = [tempered(q[i, h], k[part, h // each], 0.0, 1.0) @ v[part, h // each] for i in part]
            features[c, h] = (
                tempered(np.mean(outputs, axis=0), local[:, h // each], 0.0, 1.0) @ local[:, h // each]
            )
    found = []
    for i in range(length, len(q)):
        plain, one = turned(q[i : i + 1], [-i])[0], []
        for h in range(heads):
            middle = largest(features[:, h] @ plain[h], policy.budget // size - 2, range(1, count - 1))
            chosen = {0, *middle, count - 1}
            one.append([j for j in range(i + 1) if j // size in chosen or j >= length])
        found.append(one)
    return found


def lserve(policy, q, k, length):
    """The tokens that each key/value head reads at every step after a prompt of so many tokens."""
    groups, each, page = k.shape[1], q.shape[1] // k.shape[1], policy.page

    def likes(i, g, number):
        """S of a page."""
        scores = []
        for start in range(number * page, (number + 1) * page, policy.logical):
            part = k[start : start + policy.logical, g]
            for one in q[i, g * each : (g + 1) * each]:
                scores.append(
                    sum(max(x * a, x * b) for x, a, b in zip(one, part.max(0), part.min(0), strict=True))
                )
        return max(scores)

    found, chosen = [], None
    for i in range(length, len(q)):
        always = {
            j for j in range(i + 1) if j < policy.sinks or j > i - policy.recent or j // page == i // page
        }
        if (i - length) % policy.reuse == 0:
            free = sorted({j // page for j in range(i + 1) if j not in always})
            chosen = [
                largest({p: likes(i, g, p) for p in free}, policy.budget // page, free) for g in range(groups)
            ]
        found.append([sorted(always | {j for j in range(i + 1) if j // page in one}) for one in chosen])
    return found


def infllm(policy, q, k):
    """The tokens near and far that all heads read for every query."""
    t, heads, each, window = len(q), q.shape[1], q.shape[1] // k.shape[1], policy.window
    salience = np.zeros((heads, t))
    for h in range(heads):
        for m in range(t):
            salience[h, m] = (
                sum(q[i, h] @ k[m, h // each] for i in range(m + 1, min(t, m + window + 1))) / window
            )
    found = []
    for i in range(t):
        near = [j for j in range(i + 1) if i - j < window]
        units = [
            range(start, start + policy.unit)
            for start in range(policy.sinks, i, policy.unit)
            if start + policy.unit - 1 <= i - window
        ]

        def likes(unit, i=i):
            total = 0.0
            for h in range(heads):
                tokens = largest(salience[h], policy.representatives, unit)
                keys, one = k[tokens], q[i : i + 1]
                if policy.distance == "window":
                    keys, one = turned(keys, [-j for j in tokens]), turned(one, [window - i])
                total += one[0, h] @ keys[:, h // each].mean(0)
            return total

        scores = [likes(unit) for unit in units]
        left = set(range(len(units))) - set(largest(scores, policy.budget // policy.unit, range(len(units))))
        unread = {j for u in left for j in units[u]}
        found.append((near, [j for j in range(i + 1) if i - j >= window and j not in unread]))
    return found


def shadowkv(policy, q, k, length):
    """Keys as they are read (t, g, k), and the tokens that each key/value head reads at every step after the prompt."""
    groups, each, size = k.shape[1], q.shape[1] // k.shape[1], policy.chunk
    plain = turned(k[:length], -np.arange(length)).reshape(length, -1)
    basis = np.linalg.svd(plain, full_matrices=False)[2][: policy.rank]
    keys = k.copy()
    chunks = max(0, length // size - policy.local)
    near = turned((plain @ basis.T @ basis).reshape(length, groups, -1), np.arange(length))
    rest, landmarks = [], []
    for g in range(groups):
        parts = [k[c * size : (c + 1) * size, g] for c in range(chunks)]
        means = [part.mean(0) for part in parts]
        least = [
            min(one @ mean / np.linalg.norm(one) / np.linalg.norm(mean) for one in part)
            for part, mean in zip(parts, means, strict=True)
        ]
        outliers = largest([-x for x in least], policy.outliers, range(chunks))
        rest.append([c for c in range(chunks) if c not in outliers])
        landmarks.append(means)
        for c in rest[g]:
            keys[c * size : (c + 1) * size, g] = near[c * size : (c + 1) * size, g]
    found = []
    for i in range(length, len(q)):
        one = []
        for g in range(groups):
            scores = {}
            for h in range(g * each, (g + 1) * each):
                powers = {c: np.exp(q[i, h] @ landmarks[g][c] / np.sqrt(q.shape[2])) for c in rest[g]}
                for c, power in powers.items():
                    scores[c] = max(scores.get(c, 0.0), power / sum(powers.values()))
            unread = set(rest[g]) - set(largest(scores, policy.budget // size, rest[g]))
            one.append([j for j in range(i + 1) if j // size not in unread or j >= length])
        found.append(one)
    return keys, found


def locret(policy, scores, length, calls):
    """The tokens that each key/value head holds before every query, whose calls end before the tokens of numbers `calls`."""
    kept, found, now = [[] for _ in range(scores.shape[1])], [], 0
    for end in calls:
        while now < end:
            piece = range(now, min(now + policy.chunk, end))
            kept = [[*one, *piece] for one in kept]
            found += [[[j for j in one if j <= i] for one in kept] for i in piece]
            now = piece[-1] + 1
            for g, one in enumerate(kept):
                last = [j for j in one if j > now - 1 - policy.recent]
                rest = [j for j in one if j not in last]
                kept[g] = sorted(largest(scores[:, g], policy.budget - len(last), rest) + last)
    return found


def minference(policy, pattern, q, k):
    """The tokens that each query of a prompt (t, k) reads along a pattern, given the keys (t, k) of its head."""
    (name, m, n), t, size = pattern, len(q), policy.block
    blocks, columns = set(), []
    count = -(-t // size)
    if name == "a_shape":
        for i in range(t):
            for j in range(i + 1):
                if i - j < n or j < m:
                    # Blocks with such a pair of tokens, wherever the queries stand in theirs.
                    blocks.add((i // size, j // size))
        for i in range(count):
            blocks |= {(i, j) for j in range(i + 1) if (i - j) * size - size + 1 < n}
    if name == "vertical_slash":
        sums, diagonals = np.zeros(t), np.zeros(t)
        for i in range(max(0, t - policy.window), t):
            weights = tempered(q[i], k[: i + 1], 0.0, 1.0)
            sums[: i + 1] += weights
            diagonals[i - np.arange(i + 1)] += weights
        sums[: policy.first], diagonals[: policy.near] = np.inf, np.inf
        columns = largest(sums, m, range(t))
        chosen = largest(diagonals, n, range(t))
        for i in range(count * size):
            blocks |= {(i // size, (i - d) // size) for d in chosen if d <= i}
    if name == "block_sparse":
        parts = [range(b * size, min((b + 1) * size, t)) for b in range(count)]
        for i, part in enumerate(parts):
            likes = [q[part].mean(0) @ k[other].mean(0) for other in parts[: i + 1]]
            blocks |= {(i, j) for j in [i, *largest(likes, m, range(i + 1))]}
    return [[j for j in range(i + 1) if (i // size, j // size) in blocks or j in columns] for i in range(t)]


def hip(policy, q, k, begin, stop):
    """The tokens that the queries `begin` to `stop` - 1 read in a call, given queries (t, k) and keys (t, k) of a head."""
    most, size, found = policy.budget // policy.block, policy.block, []
    for first in range(begin // policy.queries * policy.queries, stop, policy.queries):
        end = min(first + policy.queries, stop)
        asked = range(max(first, begin), end)
        before = max(0, end - policy.window)
        blocks = -(-before // size)
        groups = [(c, 1) for c in range(blocks)]
        if blocks > most:
            edges = [blocks * c // most for c in range(most + 1)]
            groups = [(a, b - a) for a, b in pairwise(edges)]
            length = blocks / most
            while length > 1:
                halves = [
                    half for a, n in groups for half in ((a, n // 2), (a + n // 2, n - n // 2)) if half[1]
                ]

                def likes(half, asked=asked, end=end):
                    return (q[asked] @ k[half[0] * size : min((half[0] + 1) * size, end)].T).max()

                groups = sorted(halves, key=likes, reverse=True)[:most]
                length /= 2
        chosen = {a for a, _ in groups} | set(range(before // size, -(-end // size)))
        found += [[j for j in range(i + 1) if j // size in chosen] for i in asked]
    return found


def sale(policy, q, k, begin, stop):
    """The tokens that the queries `begin` to `stop` - 1 read in a call, given queries (t, k) and keys (t, k) of a head."""
    size, scale, found = policy.block, q.shape[1] ** -0.5, []
    q_mean, k_mean = q[begin:stop].mean(0), k[:stop].mean(0)

    def coded(x):
        step = np.abs(x).max() / 7
        return np.rint(x / step) * step

    for first in range(begin // policy.queries * policy.queries, stop, policy.queries):
        asked = range(max(first, begin), min(first + policy.queries, stop))
        end = first + policy.queries
        near = {
            j // size
            for j in range(stop)
            if j // size * size < policy.sinks or first - policy.window < j // size * size + size < end + size
        }
        scores = dict.fromkeys(near, np.inf)
        for i in asked:
            total = sum(np.exp(scale * q[i] @ k[j]) for j in range(i + 1) if j // size in near)
            for j in range(i + 1):
                codes = coded(q[i] - q_mean) @ coded(k[j] - k_mean)
                estimate = scale * (codes + q_mean @ (k[j] - k_mean) + q[i] @ k_mean)
                scores[j // size] = max(scores.get(j // size, 0.0), np.exp(estimate) / total)
        chosen = [b for b, score in scores.items() if score > policy.threshold]
        if policy.budget is not None:
            chosen = largest(scores, policy.budget // size, chosen)
        found += [[j for j in range(i + 1) if j // size in chosen] for i in asked]
    return found


def unlimiformer(policy, q, k, length):
    """The tokens that each query head reads at every step after a prompt of so many tokens."""
    each = q.shape[1] // k.shape[1]
    return [
        [
            [*largest(k[:length, h // each] @ q[i, h], policy.budget, range(length)), *range(length, i + 1)]
            for h in range(q.shape[1])
        ]
        for i in range(length, len(q))
    ]
