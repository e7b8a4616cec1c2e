"""In-context linear regression: pairs of an input and its value under an unknown linear map, the value asked for at every input.

    python -m experiments.train --config=configs/synthetic/linear_regression.py:mixer=gla --workdir=runs/regression-gla
    python -m experiments.train --config=configs/synthetic/linear_regression.py:mixer=attention,scale=paper --workdir=runs/regression

Any causal mixer; mixer=NAME, width, depth, learning_rate, scale=small|paper. Small has 5 dimensions and 11 pairs a row, and also reads
22; paper 20 and 41 (Garg et al. 2022, arXiv:2208.01066), 12 layers of width 256, 500,000 steps of 64 at 1e-4, but without their
curriculum of dimensions. The test results print the losses of least squares and of one step of gradient descent, by number of
examples too, beside those of the model.

Results: experiments/results/sweeps/linear_regression, in 3 dimensions. After 7 examples the loss is 0.12 (DeltaNet), 0.30 (attention),
0.45 (linear attention) and 0.94 (GLA); one gradient step has 0.34, and least squares 0.
"""

from ml_collections import ConfigDict

OPTIONS = dict(mixer="gla", width="", depth="", learning_rate="", scale="small")
NEEDS_LENGTH = ("dss", "hyena", "sgconv")  # their kernels are as long as they are told


def get_config(arg: str = "") -> ConfigDict:
    given = dict(pair.partition("=")[::2] for pair in arg.split(",") if pair)
    if unknown := given.keys() - OPTIONS.keys():
        raise ValueError(f"linear_regression.py takes {', '.join(OPTIONS)}, not {', '.join(unknown)}")
    options = OPTIONS | given
    if options["scale"] not in ("small", "paper"):
        raise ValueError(f"scale={options['scale']}; expected small or paper")
    mixer, small = options["mixer"], options["scale"] == "small"
    dims, points = (5, 11) if small else (20, 41)

    config = ConfigDict()
    config.seed = 0
    config.task = dict(name="linear_regression", dims=dims, points=points, extrapolate=(2 * points,))
    config.model = dict(
        kind="regressor",
        width=int(options["width"] or (64 if small else 256)),
        depth=int(options["depth"] or (4 if small else 12)),
        pattern=(mixer,),
        # Twice the pairs, as the further split has, and two tokens a pair.
        mixers={mixer: dict(max_length=4 * points)} if mixer in NEEDS_LENGTH else {},
        mixer_defaults=dict(heads=4 if small else 8, causal=True),
        channel="mlp",
    )
    config.data = {}
    if small:
        config.train = dict(batch_size=64, steps=4000, eval_every=0.064, log_every=50)
    else:
        config.train = dict(batch_size=64, steps=500_000, eval_every=0.32, log_every=100)
    rate = float(options["learning_rate"] or (1e-3 if small else 1e-4))
    config.optimizer = dict(learning_rate=rate, warmup_steps=100, clip_norm=1.0, weight_decay=0.0)
    return config
