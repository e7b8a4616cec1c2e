"""Update rules with groups of parameters, and schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.training.model import Declaration
from experiments.training.optimizers import Group, Optimizer, OptimizerConfig, assign_groups
from seqmodels.names import Names

PATHS = {"a": "default", "b": "ssm", "c": "ssm/dt", "d": "ssm/b", "e": "no_decay"}
SHAPES = {"a": (3, 2), "b": (4,), "c": (2,), "d": (2, 2), "e": (5,)}


def declare(name, shape, group, axes=None, layers=0):
    names = Names(tuple(f"blocks/{i}/{name}" for i in range(layers)) or (name,), bool(layers))
    return Declaration(shape, jnp.dtype("float32"), group, axes or (None,) * len(shape), names)


DECLARATIONS = {name: declare(name, SHAPES[name], PATHS[name]) for name in PATHS}


def make(**options):
    config = OptimizerConfig(**(dict(learning_rate=0.1, weight_decay=0.5) | options))
    chosen, groups = assign_groups(config, PATHS)
    return config, chosen, groups


def random_arrays(seed):
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}


def test_the_longest_prefix_decides():
    _, chosen, groups = make(groups={"ssm": {"learning_rate": 0.01}, "ssm/b": {"weight_decay": 0.0}})
    assert chosen == {"a": "default", "b": "ssm", "c": "ssm", "d": "ssm/b", "e": "no_decay"}
    assert groups["ssm"] == Group("ssm", learning_rate=0.01, weight_decay=0.0)
    assert groups["ssm/b"] == Group("ssm/b", learning_rate=0.01, weight_decay=0.0)
    assert groups["no_decay"] == Group("no_decay", learning_rate=0.1, weight_decay=0.0)


def test_rates_have_their_own_rates_unless_the_config_asks():
    _, chosen, groups = make()
    assert chosen == {"a": "default", "b": "ssm", "c": "ssm", "d": "ssm", "e": "no_decay"}
    assert groups["ssm"] == Group("ssm", learning_rate=0.1 / 3, weight_decay=0.0)
    _, chosen, groups = make(groups={"ssm/dt": {"learning_rate": 0.02}, "ssm/b": {"weight_decay": 0.3}})
    assert groups["ssm/dt"] == Group("ssm/dt", learning_rate=0.02, weight_decay=0.0)
    assert groups["ssm/b"] == Group("ssm/b", learning_rate=0.1 / 3, weight_decay=0.3)


def test_no_decay_can_be_given():
    _, _, groups = make(groups={"no_decay": {"weight_decay": 0.2}})
    assert groups["no_decay"].weight_decay == 0.2


@pytest.mark.parametrize("name", ["sm", "ssm/c", "ssm/dt/x"])
def test_a_group_without_parameters_is_refused(name):
    with pytest.raises(ValueError, match=r"covers no parameter.*default, no_decay, ssm, ssm/b, ssm/dt"):
        make(groups={name: {"learning_rate": 0.1}})


def test_a_group_that_longer_ones_take_all_from_is_refused():
    paths = {path: group for path, group in PATHS.items() if group != "ssm"}
    overrides = {name: {"learning_rate": 0.1} for name in ("ssm", "ssm/b", "ssm/dt")}
    with pytest.raises(ValueError, match="'ssm'.*covers no parameter"):
        assign_groups(OptimizerConfig(learning_rate=1.0, groups=overrides), paths)


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(learning_rate=0), ValueError, "optimizer.learning_rate=0; expected a number above 0"),
        (dict(learning_rate="1"), TypeError, "optimizer.learning_rate='1'; expected a number"),
        (dict(weight_decay=-1), ValueError, "optimizer.weight_decay=-1"),
        (dict(b1=1.0), ValueError, "optimizer.b1=1.0; expected a number of at least 0 and below 1"),
        (dict(ema=1.0), ValueError, "optimizer.ema=1.0; expected a number of at least 0 and below 1"),
        (
            dict(final_learning_rate=1.5),
            ValueError,
            "final_learning_rate=1.5; expected a number of at least 0 and at most 1",
        ),
        (dict(clip_norm=0), ValueError, "optimizer.clip_norm=0"),
        (dict(warmup_steps=1, warmup_epochs=1), ValueError, "warmup_epochs or optimizer.warmup_steps"),
        (dict(warmup_steps=1.5), TypeError, "optimizer.warmup_steps=1.5; expected an integer"),
        (dict(groups={"ssm": {"learning_rat": 1}}), ValueError, "did you mean 'learning_rate'"),
        (dict(groups={"ssm": {}}), ValueError, "expected a dict with learning_rate"),
        (dict(groups={"default": {"weight_decay": 0}}), ValueError, "set optimizer.learning_rate"),
    ],
)
def test_impossible_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_a_warm_up_as_long_as_training_is_refused():
    config, _, _ = make()
    with pytest.raises(ValueError, match="warm-up of 10 steps is not shorter than the training of 10"):
        Optimizer(config, DECLARATIONS, warmup_steps=10, total_steps=10)


def test_the_schedule_rises_linearly_and_falls_as_a_cosine():
    config, _, _ = make(final_learning_rate=0.1)
    optimizer = Optimizer(config, DECLARATIONS, warmup_steps=4, total_steps=14)
    values = [float(optimizer.schedule(step)) for step in range(15)]
    np.testing.assert_allclose(values[:5], [0.25, 0.5, 0.75, 1.0, 1.0])
    cosine = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * np.arange(11) / 10))
    np.testing.assert_allclose(values[4:], cosine, rtol=1e-6)


def test_updates_equal_optax_on_separate_parameters():
    config, chosen, groups = make(groups={"ssm": {"learning_rate": 0.01, "weight_decay": 0.3}}, clip_norm=2.0)
    optimizer = Optimizer(config, DECLARATIONS, warmup_steps=2, total_steps=6)
    arrays = random_arrays(0)
    transforms = {
        name: optax.adamw(
            lambda step, g=group: g.learning_rate * optimizer.schedule(step), weight_decay=group.weight_decay
        )
        for name, group in groups.items()
    }
    expected_optimizer = optax.chain(
        optax.clip_by_global_norm(2.0),
        optax.multi_transform(transforms, lambda tree: {p: chosen[p] for p in tree}),
    )
    expected, expected_state = arrays, expected_optimizer.init(arrays)
    transformation = optimizer.transformation()
    state, ours = transformation.init(arrays), arrays
    for step in range(5):
        gradients = random_arrays(step + 1)
        updates, expected_state = expected_optimizer.update(gradients, expected_state, expected)
        expected = optax.apply_updates(expected, updates)
        updates, state = jax.jit(transformation.update)(gradients, state, ours)
        ours = optax.apply_updates(ours, updates)
    for name, array in ours.items():
        np.testing.assert_allclose(array, expected[name], rtol=2e-5, atol=1e-6, err_msg=name)


def test_without_gradients_only_decayed_groups_move():
    config, _, _ = make(groups={"ssm": {"weight_decay": 0.0}})
    optimizer = Optimizer(config, DECLARATIONS, warmup_steps=0, total_steps=9)
    arrays = random_arrays(0)
    zeros = jax.tree.map(np.zeros_like, arrays)
    transformation = optimizer.transformation()
    updates, _ = transformation.update(zeros, transformation.init(arrays), arrays)
    for name, array in optax.apply_updates(arrays, updates).items():
        moved = name == "a"
        np.testing.assert_allclose(array, arrays[name] * (0.95 if moved else 1.0), rtol=1e-6, err_msg=name)


def test_the_table_counts_every_parameter_once():
    config, _, _ = make(groups={"ssm": {"learning_rate": 0.01}})
    table = Optimizer(config, DECLARATIONS, warmup_steps=0, total_steps=2).table()
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()[1:]}
    assert rows["default"] == ["1", "6", "0.1", "0.5", "default"]
    assert rows["ssm"] == ["3", "10", "0.01", "0", "ssm,", "ssm/b,", "ssm/dt"]
    assert sum(int(row[1]) for row in rows.values()) == 21


def rule(name, declarations, arrays, gradients, **options):
    """The updates that a rule makes of the first gradients, with learning rate 1 and no decay."""
    if any(declaration.group.startswith("ssm") for declaration in declarations.values()):
        options = {"groups": {"ssm": {"learning_rate": 1.0}}} | options
    config = OptimizerConfig(**(dict(learning_rate=1.0, name=name, schedule="constant") | options))
    transformation = Optimizer(config, declarations, warmup_steps=0, total_steps=9).transformation()
    return jax.jit(transformation.update)(gradients, transformation.init(arrays), arrays)[0]


def test_muon_makes_hidden_matrices_orthogonal_layer_by_layer():
    """And leaves vectors, embeddings and other groups to Adam."""
    rng = np.random.default_rng(0)
    shapes = {"w": (3, 4, 8), "one": (6, 5), "table": (7, 4), "scale": (4,), "b": (4, 4)}
    declarations = {
        "w": declare("w", shapes["w"], "default", ("layer", "embed", "mlp"), layers=3),
        "one": declare("one", shapes["one"], "default"),
        "table": declare("table", shapes["table"], "default", ("vocab", "embed")),
        "scale": declare("scale", shapes["scale"], "no_decay"),
        "b": declare("b", shapes["b"], "ssm/b"),
    }
    arrays, gradients = (
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(2)
    )
    muon = rule("muon", declarations, arrays, gradients, muon_rms=0.5)
    adam = rule("adamw", declarations, arrays, gradients)
    for name in ("table", "scale", "b"):
        np.testing.assert_allclose(muon[name], adam[name], rtol=1e-6)
    for matrix, gradient in [*zip(muon["w"], gradients["w"], strict=True), (muon["one"], gradients["one"])]:
        u, _, v = np.linalg.svd(gradient, full_matrices=False)
        scaled = -np.asarray(matrix) / (0.5 * max(matrix.shape) ** 0.5)
        singular = np.linalg.svd(scaled, compute_uv=False)
        assert singular.min() > 0.6  # Newton-Schulz is that exact
        assert singular.max() < 1.3
        assert np.vdot(scaled, u @ v) / np.linalg.norm(scaled) / np.linalg.norm(u @ v) > 0.97


def test_lion_moves_by_the_sign():
    arrays, gradients = random_arrays(0), random_arrays(1)
    for name, update in rule("lion", DECLARATIONS, arrays, gradients).items():
        np.testing.assert_array_equal(update, -np.sign(gradients[name]))


def test_adafactor_is_optax_factored():
    arrays, gradients = random_arrays(0), random_arrays(1)
    expected = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    want, _ = expected.update(gradients, expected.init(arrays), arrays)
    for name, update in rule("adafactor", DECLARATIONS, arrays, gradients).items():
        np.testing.assert_allclose(update, -want[name], rtol=1e-5)


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(schedule="constant"), [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        (dict(schedule="wsd", decay_fraction=0.4), [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        (
            dict(schedule="wsd", decay_fraction=0.2, final_learning_rate=0.5),
            [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.75],
        ),
        (dict(schedule="rsqrt"), [0.5, 1, *np.sqrt(2 / np.arange(2, 10))]),
    ],
)
def test_schedules_against_their_equations(options, expected):
    config, _, _ = make(**options)
    optimizer = Optimizer(config, DECLARATIONS, warmup_steps=2, total_steps=10)
    np.testing.assert_allclose([float(optimizer.schedule(step)) for step in range(10)], expected, rtol=1e-6)


@pytest.mark.parametrize("field, near", [("name", "adamw"), ("schedule", "cosine")])
def test_unknown_rules_and_schedules_are_refused_with_the_nearest(field, near):
    with pytest.raises(ValueError, match=f"did you mean '{near}'"):
        make(**{field: near[:-1]})
