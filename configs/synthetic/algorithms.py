"""Copy, parity, sorting, addition, counting and the mode: trained on short inputs, evaluated on longer ones.

    python -m experiments.train --config=configs/synthetic/algorithms.py:task=parity,mixer=deltanet --workdir=runs/parity
    python -m experiments.evaluate --workdir=runs/parity --split=length_256

    task=copy|copy_unique|count|mode|parity|running_parity|sorting|sorting_hints|addition|addition_hints

Any causal mixer; mixer=NAME, width, depth, learning_rate, scale=small|paper. Small trains on lengths up to 10 (parity
up to 20); paper up to 20 for copying and sorting (Kazemnejad et al. 2023, arXiv:2305.19466), from 3 to 40 for parity
(Grazzi et al. 2025, arXiv:2411.12537) and up to 40 digits for addition (Zhou et al. 2024, arXiv:2402.09371). Mixers with
an option `negative_eigenvalues` use it, as only those can learn parity. `running_parity` asks for the parity at every bit.
`copy_unique`, `count` and `mode` are tasks of Zhou et al. 2024 (arXiv:2310.16028) with short programs in RASP-L. `addition_hints` has a
letter before every digit (arXiv:2402.09371), and `sorting_hints` asks for the next larger element in half of the training examples
(arXiv:2310.00726). With segment=TOKENS, rows are read in segments, between which memory=VECTORS (4) are carried (RMT, arXiv:2207.06881):

    python -m experiments.train --config=configs/synthetic/algorithms.py:task=running_parity,mixer=attention,segment=5 --workdir=runs/memory

With recall=COUNT too, segments leave one vector each and recall those of as many before (HMT, arXiv:2405.06067).

RMT above has an accuracy of 0.9999 of bits in the test, whose rows have up to 20, and 0.965 at 160 (experiments/results/recurrent_memory).
"""

from ml_collections import ConfigDict

OPTIONS = dict(task="parity", mixer="deltanet", width="64", depth="2", learning_rate="1e-3", scale="small")
OPTIONS |= dict(segment="", memory="4", recall="")
LENGTHS = {  # of training, and of the further splits
    ("copy", "small"): ((1, 10), (10, 12, 15, 20, 40)),
    ("copy", "paper"): ((1, 20), (20, 24, 30, 40, 80)),
    ("parity", "small"): ((1, 20), (20, 40, 80, 160)),
    ("parity", "paper"): ((3, 40), (40, 64, 128, 256)),
    ("sorting", "small"): ((1, 10), (10, 12, 15, 20, 40)),
    ("sorting", "paper"): ((1, 20), (20, 24, 30, 40, 80)),
    ("addition", "small"): ((1, 6), (6, 8, 12, 20)),
    ("addition", "paper"): ((1, 40), (40, 60, 80, 100)),
}
for hinted, plain in dict(
    copy_unique="copy", count="copy", mode="copy", addition_hints="addition", sorting_hints="sorting"
).items():
    LENGTHS |= {(hinted, scale): LENGTHS[plain, scale] for scale in ("small", "paper")}


def get_config(arg: str = "") -> ConfigDict:
    given = dict(pair.partition("=")[::2] for pair in arg.split(",") if pair)
    if unknown := given.keys() - OPTIONS.keys():
        raise ValueError(f"algorithms.py takes {', '.join(OPTIONS)}, not {', '.join(unknown)}")
    options = OPTIONS | given
    running = options["task"] == "running_parity"
    task, scale = "parity" if running else options["task"], options["scale"]
    if (task, scale) not in LENGTHS:
        known = ", ".join(dict.fromkeys(name for name, _ in LENGTHS))
        raise ValueError(f"task={task},scale={scale}; expected running_parity, {known}, and small or paper")

    config = ConfigDict()
    config.seed = 0
    lengths, extrapolate = LENGTHS[task, scale]
    config.task = dict(name=task, lengths=lengths, extrapolate=extrapolate)
    if running:
        config.task.running = True
    config.model = dict(
        kind="language_model",
        width=int(options["width"]),
        depth=int(options["depth"]),
        pattern=(options["mixer"],),
        mixer_defaults=dict(heads=4, causal=True, negative_eigenvalues=True),
        channel="swiglu",
    )
    if options["segment"]:
        config.model.kind = "recurrent_memory"
        config.model.update(segment=int(options["segment"]), memory=int(options["memory"]))
    if options["segment"] and options["recall"]:
        config.model.kind = "hierarchical_memory"
        config.model.update(memory=1, recall=int(options["recall"]))
    config.data = {}
    steps = 2000 if scale == "small" else 20_000
    config.train = dict(batch_size=64, steps=steps, eval_every=0.32, log_every=50)
    config.optimizer = dict(
        learning_rate=float(options["learning_rate"]), weight_decay=0.01, warmup_steps=100, clip_norm=1.0
    )
    return config
