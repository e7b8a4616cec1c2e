"""Published test accuracies on Long Range Arena, in percent, by protocol, mixer and task.

"s4" is the protocol of S4: models of about a million parameters, many epochs, pixels as values, characters. "lra" is that of
the benchmark's own small Transformers, with tokens and bytes. The two never share a column. FAIL is an accuracy of chance.

Sources: "lra", the benchmark's repository, and FNet from the S4 paper; "s4", the papers of S4 (v2), S4D (LegS), S5, MEGA, SGConv's
repository, LRU in the table of LION, Liquid-S4, Mamba and Mamba-2 in the tables of B2S6.
"""

TASKS = ("ListOps", "Text", "Retrieval", "Image", "Pathfinder", "Path-X")
FAIL = None
CHANCE = 50.0  # what a failure on Path-X, of two classes, counts for in an average

PUBLISHED: dict[str, dict[str, tuple[float | None, ...]]] = {
    "s4": {
        "s4": (59.60, 86.82, 90.90, 88.65, 94.20, 96.35),
        "s4d": (60.47, 86.18, 89.46, 88.19, 93.06, 91.95),
        "s5": (62.15, 89.31, 91.40, 88.00, 95.33, 98.58),
        "lru": (60.2, 89.4, 89.9, 89.0, 95.1, 94.2),
        "liquid_s4": (62.75, 89.02, 91.20, 89.50, 94.80, 96.66),
        "sgconv": (61.45, 89.20, 91.11, 87.97, 95.46, 97.83),
        "mega": (63.14, 90.43, 91.25, 90.44, 96.01, 97.98),
        "mega_chunk": (58.76, 90.19, 90.97, 85.80, 94.41, 93.81),
        "mamba": (38.02, 82.98, 72.14, 69.82, 69.26, 67.32),
        "mamba2": (41.45, 86.09, 79.23, 71.96, 75.45, 69.07),
    },
    "lra": {
        "attention": (36.37, 64.27, 57.46, 42.44, 71.40, FAIL),
        "local_attention": (15.82, 52.98, 53.39, 41.46, 66.63, FAIL),
        "linformer": (35.70, 53.94, 52.27, 38.56, 76.34, FAIL),
        "performer": (18.01, 65.40, 53.82, 42.77, 77.05, FAIL),
        "linear_attention": (16.13, 65.90, 53.09, 42.34, 75.30, FAIL),
        "fnet": (35.33, 65.11, 59.61, 38.67, 77.80, FAIL),
    },
}
NOTES = {("s4", "lru", "Image"): "LRU's Image is in colour."}


def published(protocol: str | None, mixer: str) -> dict[str, float | None] | None:
    """Returns the published accuracy on each task, FAIL for chance; None if nothing is published."""
    found = PUBLISHED.get(protocol or "", {}).get(mixer)
    return None if found is None else dict(zip(TASKS, found, strict=True))
