"""muP: kinds of parameters, their initial values and learning rates, and first steps that do not depend on the width."""

import math

import numpy as np
import pytest
from flax import nnx

from experiments.analysis.coordinates import coordinate_check
from experiments.training.model import SplitModel
from experiments.training.optimizers import Optimizer, OptimizerConfig
from layers.parameters import rate_of
from seqmodels import build_model, language_model, width_transfer
from seqmodels.width_transfer import at_width, kind_of

BASE = dict(
    kind="language_model",
    vocab_size=16,
    width=32,
    depth=2,
    pattern=("attention", "mamba2+none"),
    mixer_defaults=dict(heads=4),
    mixers=dict(mamba2=dict(head_dim=8, state_size=8)),
    base_width=32,
)


def parameters(values):
    return dict(nnx.to_flat_state(nnx.state(build_model(values, rngs=nnx.Rngs(0)), nnx.Param)))


@pytest.mark.parametrize(
    "path, shape, base, expected",
    [
        (("mixer", "query", "kernel"), (64, 64), (16, 16), ("hidden", 1 / 4)),
        (("stacked", 0, "query", "kernel"), (2, 64, 64), (2, 16, 16), ("hidden", 1 / 4)),
        (("head", "kernel"), (64, 10), (16, 10), ("output", 1 / 4)),
        (("decay", "outer", "kernel"), (8, 64), (8, 16), ("input", 1.0)),
        (("embedding", "table"), (10, 64), (10, 16), ("input", 1.0)),
        (("norm", "scale"), (64,), (16,), ("input", 1.0)),
        (("stacked", 0, "norm", "scale"), (2, 64), (2, 16), ("input", 1.0)),
        (("mixer", "log_a"), (64, 8), (16, 8), ("input", 1.0)),
        (("convolution", "weight"), (4, 64), (4, 16), ("input", 1.0)),
        (("router", "kernel"), (8, 8), (8, 8), ("input", 1.0)),
        (("mixer", "single", "kernel"), (64, 1), (16, 1), ("output", 1 / 4)),
    ],
)
def test_kinds(path, shape, base, expected):
    assert kind_of(path, shape, base) == expected


def test_learning_rates_and_decays_are_those_of_the_kinds():
    wide = at_width(BASE, 64)
    assert wide["mixer_defaults"] == dict(heads=8)
    model = SplitModel(lambda rngs: build_model(wide, rngs=rngs))
    rule = Optimizer(OptimizerConfig(0.01, weight_decay=0.1), model.parameters, 0, 2)
    rates = {path: (group.learning_rate, group.weight_decay) for path, group in rule.groups.items()}
    for path, (rate, decay) in rates.items():
        if path.endswith("/kernel"):
            assert (rate, decay) == (0.005, 0.2), path
        else:
            plain = path == "embedding/table" or path.endswith("convolution/weight")
            assert (rate, decay) == (0.01, 0.1 if plain else 0.0), path
    assert "default*0.5" in rule.table()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_initial_values_are_those_of_the_kinds(tied):
    values = BASE | dict(tie_embeddings=tied, vocab_size=200)
    base, wide = parameters(values), parameters(at_width(values, 512))
    stds = {path: (np.std(base[path][...]), np.std(wide[path][...])) for path in wide}
    for path, (narrow, large) in stds.items():
        if path[-1] == "kernel":
            # A matrix between features, and one from features to as many outputs at every width.
            factor = 1 / 16 if path[0] == "head" else 1 / 4
            assert large / narrow == pytest.approx(factor, rel=0.1), path
        elif path == ("embedding", "table"):
            assert large == pytest.approx(1 / math.sqrt(32), rel=0.05)
            assert narrow == pytest.approx(1 / math.sqrt(32), rel=0.05)
    assert rate_of(wide["stack", "blocks", 0, "mixer", "query", "kernel"]) == 1 / 16
    # At the base itself nothing changes.
    for path, variable in parameters(values | dict(base_width=None)).items():
        np.testing.assert_array_equal(variable[...], base[path][...])


def changes(width):
    return coordinate_check(BASE, (width,), steps=4, learning_rate=1e-2)[width]


@pytest.fixture(scope="module")
def narrow():
    """What the first steps change at the width of the base, to which no rule applies."""
    return changes(32)


@pytest.mark.slow
def test_first_steps_change_as_much_at_every_width(narrow):
    wide = changes(128)
    assert wide.keys() == narrow.keys() == {"logits", "embedding", "layer 0", "layer 1"}
    for place, change in wide.items():
        assert 0.7 < change / narrow[place] < 1.3, (place, change, narrow[place])


def no_rate_falls(path, shape, base):
    return "input", 1.0


def that_of_the_table_falls(path, shape, base):
    return ("hidden", 1 / 4) if path[-1] == "table" else kind_of(path, shape, base)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule, place, bounds",
    [
        (no_rate_falls, "layer 1", (1.6, 9)),
        (that_of_the_table_falls, "embedding", (0, 0.4)),
        (None, "logits", (1.6, 9)),
    ],
)
def test_the_coordinate_check_fails_where_a_rule_is_wrong(narrow, rule, place, bounds, monkeypatch):
    if rule is None:  # the head is the table as it is
        monkeypatch.setattr(language_model, "logit_factor", lambda config: 1.0)
    else:
        monkeypatch.setattr(width_transfer, "kind_of", rule)
    assert bounds[0] < changes(128)[place] / narrow[place] < bounds[1]
