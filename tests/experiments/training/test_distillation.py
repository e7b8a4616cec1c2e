"""Distillation is its equation, a student begins as its options say, and stages replace the layers that are needed least."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import distill, evaluate, train
from experiments.analysis.importance import metrics_without
from experiments.config.command_line import load
from experiments.parallel.mesh import Devices
from experiments.runs.directory import RunDirectory
from experiments.training import experiment
from experiments.training.distillation import HIDDEN, LOGITS, DistillConfig, distilled
from experiments.training.pretrained import initial_state
from experiments.training.teacher import Source, Teacher, begun, split
from layers.cross_entropy import Unprojected
from layers.mixers.state_space.mamba2 import Mamba2Config
from layers.parts.attention_config import AttentionConfig
from seqmodels import build_model
from seqmodels.from_attention import fits, mamba2_from_attention, mamba2_options
from seqmodels.names import by_layer
from seqmodels.recording import recording

CONFIG = "configs/synthetic/mqar.py:mixer=attention,depth=2,width=16"
TASK = {"vocab_size": "16", "length": "16", "pairs": "2", "train": "64", "validation": "32", "test": "32"}
FIELDS = {f"task.{name}": value for name, value in TASK.items()} | {
    "model.mixer_defaults.heads": "2",
    "train.batch_size": "16",
    "train.steps": "4",
    "train.tensorboard": "false",
    "optimizer.warmup_steps": "1",
}
HYBRID = {
    "model.pattern": "attention,mamba2",
    **{
        f"model.mixers.mamba2.{k}": str(v)
        for k, v in dict(inner=16, head_dim=8, state_size=8, groups=2).items()
    },
}


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_loss_is_the_equation(direction):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 2, 3, 5))
    ours, theirs = rng.normal(size=(2, 2, 3, 2, 4))
    labels = np.array([[1, -1, 2], [0, 3, 1]])
    ids = np.array([[1, 1, 1], [0, 1, 1]])
    weight = np.array([1.0, 1.0])
    # Nothing is read where nothing is counted.
    student[0, 1], theirs[1, 0] = np.nan, np.nan
    labels[1, 0] = -1
    options = dict(temperature=2.0, divergence=direction, logits=0.5, hidden=0.25, labels=2.0)
    config = DistillConfig(teacher="there", **options)
    batch = {"labels": labels, "weight": weight, "segment_ids": ids, LOGITS: teacher, HIDDEN: theirs}
    batch = {
        name: jnp.asarray(array, jnp.int32 if array.dtype.kind == "i" else jnp.float32)
        for name, array in batch.items()
    }
    sums = {"loss": jnp.float32(3.0), "count": jnp.float32(4.0)}
    hidden = [jnp.asarray(ours[:, :, layer], jnp.float32) for layer in range(2)]
    loss, parts = distilled(config, sums, jnp.asarray(student, jnp.float32), hidden, batch)
    divergence = 0.0
    for row, place in np.argwhere(labels >= 0):
        q, p = softmax(student[row, place] / 2), softmax(teacher[row, place] / 2)
        first, second = (p, q) if direction == "forward" else (q, p)
        divergence += 4 * np.sum(first * np.log(first / second))
    errors = [
        np.sum((ours[row, place, layer] - theirs[row, place, layer]) ** 2)
        / np.sum(theirs[row, place, layer] ** 2)
        for row, place in np.argwhere(ids)
        for layer in range(2)
    ]
    np.testing.assert_allclose(parts["divergence"], divergence, rtol=1e-5)
    np.testing.assert_allclose(parts["hidden_error"], 4 * np.mean(errors), rtol=1e-5)
    np.testing.assert_allclose(loss, 2 * 3 + 0.5 * divergence + 0.25 * 4 * np.mean(errors), rtol=1e-5)


def test_rows_of_classes_count_by_their_weight():
    student, teacher = np.random.default_rng(1).normal(size=(2, 3, 4)).astype(np.float32)
    weight = jnp.asarray([1.0, 0.0, 1.0])
    batch = {"labels": jnp.zeros(3, jnp.int32), "weight": weight, LOGITS: jnp.asarray(teacher)}
    sums = {"loss": jnp.float32(0.0), "count": jnp.float32(2.0)}
    loss, _ = distilled(
        DistillConfig(teacher="there"), sums, jnp.asarray(student).at[1].set(jnp.nan), (), batch
    )
    p, q = softmax(teacher.astype(np.float64)), softmax(student.astype(np.float64))
    np.testing.assert_allclose(loss, np.sum((p * np.log(p / q))[[0, 2]]), rtol=1e-5)


def test_a_mamba2_begins_with_the_maps_of_the_attention():
    attention = AttentionConfig(16, heads=4, kv_heads=2)
    config = Mamba2Config(16, **mamba2_options(attention))
    assert fits(attention, config)
    assert not fits(attention, Mamba2Config(16, inner=16, head_dim=4, state_size=4, groups=2))
    assert not fits(AttentionConfig(16, heads=4, bias=True), config)
    rng = np.random.default_rng(0)
    shapes = {"query": (16, 16), "key": (16, 8), "value": (16, 8), "output": (16, 16)}
    given = {f"{name}/kernel": jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    drawn = {"input/kernel": jnp.asarray(rng.normal(size=(16, 4 * 16 + 4)))}
    found = mamba2_from_attention(attention, given, config, drawn)
    z, u, b, c, dt = np.split(np.asarray(found["input/kernel"]), [16, 32, 48, 64], axis=1)
    np.testing.assert_array_equal(z, drawn["input/kernel"][:, :16])
    np.testing.assert_array_equal(dt, drawn["input/kernel"][:, 64:])
    np.testing.assert_array_equal(c, given["query/kernel"])
    for head in range(4):
        ours, theirs = slice(4 * head, 4 * head + 4), slice(4 * (head // 2), 4 * (head // 2) + 4)
        np.testing.assert_array_equal(u[:, ours], given["value/kernel"][:, theirs])
        np.testing.assert_array_equal(b[:, ours], given["key/kernel"][:, theirs])
    np.testing.assert_array_equal(found["output/kernel"], given["output/kernel"])


def plan_of(**fields):
    return experiment.build(load(CONFIG, list((FIELDS | fields).items())))


@pytest.fixture(scope="module")
def source():
    """A teacher that was not trained, with factors of its norms that tell them apart."""
    values = plan_of().values | {"scan": False}
    model = build_model(values, rngs=nnx.Rngs(7))
    arrays = {name: array + 0.01 for name, array in by_layer(model).items()}
    return Source(values, lambda: arrays)


@pytest.mark.slow
def test_a_student_begins_with_what_it_shares(source):
    plan = plan_of(**HYBRID, **{"train.distill.teacher": "there"})
    arrays = begun(plan.model, plan.values, source, plan.task, 3)
    named = {}
    for each, declared in zip(arrays, (plan.model.parameters, plan.model.statistics), strict=True):
        for path, array in each.items():
            named |= declared[path].split(array)
    drawn = by_layer(build_model({**plan.values, "scan": False}, rngs=nnx.Rngs(jax.random.key(3))))
    theirs, mixer = source.read(), "stack/blocks/1/mixer"
    assert named.keys() == drawn.keys()
    kept = [name for name in named if not name.startswith(f"{mixer}/")]
    assert len(kept) == len(theirs) - 4
    for name in kept:
        np.testing.assert_array_equal(named[name], theirs[name], err_msg=name)
    maps = f"{mixer}/input/kernel", f"{mixer}/output/kernel"
    for name in named.keys() - {*kept, *maps}:
        np.testing.assert_array_equal(named[name], drawn[name], err_msg=name)
    queries = named[maps[0]][:, 48:64]
    np.testing.assert_array_equal(queries, theirs[f"{mixer}/query/kernel"])
    np.testing.assert_array_equal(named[maps[1]], theirs[f"{mixer}/output/kernel"])


@pytest.mark.slow
def test_streams_are_those_after_each_layer(source):
    model = build_model(source.values, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 5)))
    with recording() as found:
        model(tokens)
    x, _ = model.embedding(tokens)
    assert len(found) == 2
    for layer, block in enumerate(model.stack.layers):
        x, _ = block(x)
        np.testing.assert_allclose(found[layer], x, atol=1e-6)
    with recording() as found:
        model(tokens[:, :2], model.init_state(2, max_length=5))
    assert [x.shape for x in found] == [(2, 2, 16)] * 2
    stacked = build_model(source.values | {"scan": True}, rngs=nnx.Rngs(0))
    with recording(), pytest.raises(ValueError, match="expected scan=False, route=None and one stream"):
        stacked(tokens)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_descends_the_loss_of_distillation(source, accumulate):
    fields = {
        "train.distill.teacher": "there",
        "train.distill.hidden": "0.5",
        "train.accumulate": str(accumulate),
    }
    plan, devices = plan_of(**HYBRID, **fields), Devices.first(1)
    functions = plan.step_functions(devices)
    state = functions.layout.initial(0, begun(plan.model, plan.values, source, plan.task, 0))
    teacher = Teacher(plan.distill, source, plan.task, devices)
    batch = teacher(devices.put_batch(next(plan.train_batches())))
    shapes = teacher.abstract(devices.abstract_batch(plan.example_train_batches()[0]))
    assert {name: array.shape for name, array in shapes.items()} == {
        name: a.shape for name, a in batch.items()
    }
    parameters = functions.layout.packing.cut(state.parameters)

    def loss(parameters):
        with recording() as hidden:
            output, _ = plan.model(parameters, state.statistics, batch, key=None)
        _, sums = plan.task.loss(output, batch)
        total, parts = distilled(plan.distill, sums, output, hidden, batch)
        return total / sums["count"], parts

    (want, parts), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
    assert want > 0
    norm = float(jnp.sqrt(sum(jnp.sum(g**2) for g in gradients.values())))
    _, metrics = functions.train(state, batch)
    found = dict(zip(functions.train_metric_names, np.asarray(metrics), strict=False))
    np.testing.assert_allclose(found["divergence"], parts["divergence"], rtol=1e-4)
    np.testing.assert_allclose(found["hidden_error"], parts["hidden_error"], rtol=1e-4)
    np.testing.assert_allclose(np.asarray(metrics)[len(functions.train_metric_names)], norm, rtol=1e-3)


@pytest.mark.slow
def test_a_layer_without_its_mixer_adds_nothing(source):
    plan = plan_of()
    arrays = {
        name: array * (name != "stack/blocks/1/mixer/output/kernel") for name, array in source.read().items()
    }
    silent = Source(source.values, lambda: arrays)
    want = metrics_without(plan, silent, (), "test")
    assert metrics_without(plan, source, (1,), "test") == pytest.approx(want, rel=1e-6)
    assert metrics_without(plan, source, (), "test")["loss"] != pytest.approx(want["loss"], rel=1e-4)


@pytest.mark.slow
def test_stages_of_a_command(tmp_path, capsys):
    flags = [f"--config={CONFIG}", *(f"--config.{name}={value}" for name, value in FIELDS.items())]
    teacher = tmp_path / "teacher"
    assert train.main([*flags, f"--workdir={teacher}", "--num_devices=1"]) == 0
    work = tmp_path / "hybrid"
    command = [*flags, f"--teacher={teacher}", "--mixer=mamba2", "--replace=1,2", f"--workdir={work}"]
    assert distill.main(command) == 0
    record = json.loads((work / "stages.json").read_text())
    first, second = record["stages"]["1"], record["stages"]["2"]
    least = min(first["importances"], key=first["importances"].get)
    assert first["layers"] == [int(least)]
    assert second["layers"] == [0, 1]
    assert list(second["importances"]) == [str(1 - int(least))]
    assert second["test"] == RunDirectory(work / "2").results()["test"]
    config = RunDirectory(work / "2").config()
    assert config["model"]["pattern"] == ("mamba2", "mamba2")
    assert config["train"]["distill"]["start"] == str(work / "1")
    assert "2 replaced" in capsys.readouterr().out
    # Once more, nothing is trained; other folders of the same name are refused.
    assert distill.main(command) == 0
    assert json.loads((work / "stages.json").read_text()) == record
    assert distill.main([*command[:-3], "--mixer=gla", "--replace=1,2", f"--workdir={work}"]) == 2
    assert "holds stages of the teacher" in capsys.readouterr().err
    # A stage stands without its teacher.
    teacher.rename(tmp_path / "gone")
    assert evaluate.main([f"--workdir={work / '1'}", "--num_devices=1"]) == 0


@pytest.mark.slow
def test_what_a_run_begins_with(tmp_path):
    flags = [f"--config={CONFIG}", *(f"--config.{name}={value}" for name, value in FIELDS.items())]
    assert train.main([*flags, f"--workdir={tmp_path / 'teacher'}", "--num_devices=1"]) == 0
    plan = plan_of(**{"train.distill.teacher": str(tmp_path / "teacher")})
    devices = Devices.first(1)
    plan.check(devices)
    layout = plan.step_functions(devices).layout
    state = initial_state(plan, layout, devices)
    arrays = plan.source("teacher").read()
    for path, array in layout.packing.cut(state.parameters).items():
        for name, part in plan.model.parameters[path].split(array).items():
            np.testing.assert_array_equal(part, arrays[name], err_msg=name)
    # The teacher and a student that is its copy give the same.
    batch = plan.teacher(devices)(devices.put_batch(next(plan.train_batches())))
    output, _ = plan.model(layout.packing.cut(state.parameters), state.statistics, batch, key=None)
    logits = output.logits if isinstance(output, Unprojected) else output
    np.testing.assert_allclose(batch[LOGITS], logits, atol=1e-5)
    seeded = plan_of(**{"train.distill.teacher": str(tmp_path / "teacher"), "train.distill.start": "seed"})
    drawn = initial_state(seeded, layout, devices)
    np.testing.assert_array_equal(
        jax.tree.leaves(drawn.parameters)[0], jax.tree.leaves(layout.initial(0).parameters)[0]
    )
    assert split(plan.values, plan.task).num_parameters == plan.model.num_parameters
