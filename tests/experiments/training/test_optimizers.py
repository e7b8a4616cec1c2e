"""AdamW with groups of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.training.model import Layout
from experiments.training.optimizers import Group, Optimizer, OptimizerConfig, assign_groups, groups_table

PATHS = {("a",): "default", ("b",): "ssm", ("c",): "ssm/dt", ("d",): "ssm/b", ("e",): "no_decay"}
SHAPES = {("a",): (3, 2), ("b",): (4,), ("c",): (2,), ("d",): (2, 2), ("e",): (5,)}


def make(**options):
    config = OptimizerConfig(**(dict(learning_rate=0.1, weight_decay=0.5) | options))
    chosen, groups = assign_groups(config, PATHS)
    return config, chosen, groups


def random_arrays(seed):
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}


def test_the_longest_prefix_decides():
    _, chosen, groups = make(groups={"ssm": {"learning_rate": 0.01}, "ssm/b": {"weight_decay": 0.0}})
    assert chosen == {("a",): "default", ("b",): "ssm", ("c",): "ssm", ("d",): "ssm/b", ("e",): "no_decay"}
    assert groups["ssm"] == Group(learning_rate=0.01, weight_decay=0.5)
    assert groups["ssm/b"] == Group(learning_rate=0.1, weight_decay=0.0)
    assert groups["no_decay"] == Group(learning_rate=0.1, weight_decay=0.0)


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
        (dict(b1=1.0), ValueError, "optimizer.b1=1.0; expected below 1"),
        (dict(ema=1.0), ValueError, "optimizer.ema=1.0; expected below 1"),
        (dict(final_learning_rate=1.5), ValueError, "final_learning_rate=1.5; expected at most 1"),
        (dict(clip_norm=0), ValueError, "optimizer.clip_norm=0"),
        (dict(warmup_steps=1, warmup_epochs=1), ValueError, "warmup_epochs or optimizer.warmup_steps"),
        (dict(warmup_steps=1.5), TypeError, "optimizer.warmup_steps=1.5; expected an integer"),
        (dict(groups={"ssm": {"learning_rat": 1}}), ValueError, "did you mean 'learning_rate'"),
        (dict(groups={"ssm": {}}), TypeError, "expected a dict with learning_rate"),
        (dict(groups={"default": {"weight_decay": 0}}), ValueError, "set optimizer.learning_rate"),
    ],
)
def test_impossible_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_a_warm_up_as_long_as_training_is_refused():
    config, _, groups = make()
    with pytest.raises(ValueError, match="warm-up of 10 steps is not shorter than the training of 10"):
        Optimizer(config, groups, warmup_steps=10, total_steps=10)


def test_the_schedule_rises_linearly_and_falls_as_a_cosine():
    config, _, groups = make(final_learning_rate=0.1)
    optimizer = Optimizer(config, groups, warmup_steps=4, total_steps=14)
    values = [float(optimizer.schedule(step)) for step in range(15)]
    np.testing.assert_allclose(values[:5], [0.25, 0.5, 0.75, 1.0, 1.0])
    cosine = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * np.arange(11) / 10))
    np.testing.assert_allclose(values[4:], cosine, rtol=1e-6)


def test_updates_equal_optax_on_separate_parameters():
    config, chosen, groups = make(groups={"ssm": {"learning_rate": 0.01, "weight_decay": 0.3}}, clip_norm=2.0)
    optimizer = Optimizer(config, groups, warmup_steps=2, total_steps=6)
    arrays = random_arrays(0)
    layout = Layout.of(arrays, chosen)
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
    vectors = layout.join(arrays)
    state = optimizer.init(vectors)
    for step in range(5):
        gradients = random_arrays(step + 1)
        updates, expected_state = expected_optimizer.update(gradients, expected_state, expected)
        expected = optax.apply_updates(expected, updates)
        vectors, state, norm = jax.jit(optimizer.update)(
            jnp.int32(step), vectors, layout.join(gradients), state
        )
        np.testing.assert_allclose(norm, optax.tree.norm(gradients), rtol=1e-6)
    for path, array in layout.cut(vectors).items():
        np.testing.assert_allclose(array, expected[path], rtol=2e-5, atol=1e-6, err_msg=str(path))


def test_without_gradients_only_decayed_groups_move():
    config, chosen, groups = make(groups={"ssm": {"weight_decay": 0.0}})
    optimizer = Optimizer(config, groups, warmup_steps=0, total_steps=9)
    arrays = random_arrays(0)
    vectors = Layout.of(arrays, chosen).join(arrays)
    zeros = {name: np.zeros_like(v) for name, v in vectors.items()}
    new, _, _ = optimizer.update(jnp.int32(0), vectors, zeros, optimizer.init(vectors))
    for name, vector in vectors.items():
        moved = name == "default"
        np.testing.assert_allclose(new[name], vector * (0.95 if moved else 1.0), rtol=1e-6, err_msg=name)


def test_the_table_counts_every_parameter_once():
    _, chosen, groups = make(groups={"ssm": {"learning_rate": 0.01}})
    table = groups_table(Layout.of(random_arrays(0), chosen), groups, PATHS)
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()[1:]}
    assert rows["default"] == ["1", "6", "0.1", "0.5", "default"]
    assert rows["ssm"] == ["3", "10", "0.01", "0.5", "ssm,", "ssm/b,", "ssm/dt"]
    assert sum(int(row[1]) for row in rows.values()) == 21
