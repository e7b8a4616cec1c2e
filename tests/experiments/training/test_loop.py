"""Training in this process: the log, interruptions, selection of the best, and losses that are not finite."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.parallel.mesh import Devices
from experiments.runs.checkpoints import CheckpointError, Checkpoints
from experiments.runs.directory import RunDirectory, WorkdirError
from experiments.runs.interrupts import Interrupted, Stop
from experiments.runs.logs import read_lines
from experiments.training import experiment, loop
from experiments.training.evaluation import Evaluator
from experiments.training.records import NonFiniteError
from tests.experiments.tiny import build_tiny_model, make_tiny_task, tiny_config

TIMED = {"seconds", "tokens_per_second"}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(experiment, "make_task", make_tiny_task)
    monkeypatch.setattr(experiment, "build_model", build_tiny_model)


class StopAfter:
    """Asks to leave at the given check, counted from 1."""

    def __init__(self, checks=None):
        self._checks = checks

    @property
    def reason(self):
        if self._checks is None:
            return None
        self._checks -= 1
        return "a test" if self._checks <= 0 else None


def train(folder, config, stop=None):
    plan = experiment.build(config)
    run = RunDirectory.open(folder, config, plan.extension_problem)
    try:
        run.begin(config, plan.task.manifest, plan.groups_table)
        return loop.train(plan, run, devices=Devices(jax.devices()[:1]), stop=stop or StopAfter())
    finally:
        run.release()


def lines(folder):
    """The log without what depends on the clock."""
    return [
        {name: value for name, value in line.items() if name not in TIMED}
        for line in read_lines(folder / "metrics.jsonl")
    ]


def same(a, b):
    """Whether two outcomes are equal in all but time."""

    def untimed(outcome):
        metrics = (outcome.validation, outcome.test)
        return outcome.best_step, [{k: v for k, v in m.items() if k not in TIMED} for m in metrics]

    return untimed(a) == untimed(b)


def test_the_log_holds_every_interval_and_evaluation(tmp_path):
    config = tiny_config(train=dict(log_every=5, eval_every=1.5, checkpoint_every=None))
    outcome = train(tmp_path, config)
    steps = {
        kind: [line["step"] for line in lines(tmp_path) if line["kind"] == kind]
        for kind in ("train", "validation")
    }
    assert steps["train"] == [5, 10, 15, 20]
    assert steps["validation"] == [9, 18, 24]  # every 1.5 epochs of 6 steps, and at the end
    assert lines(tmp_path)[0]["epoch"] == 0.8333
    assert lines(tmp_path)[-1] == {
        "kind": "test",
        "step": 24,
        "epoch": 4.0,
        **{k: v for k, v in outcome.test.items() if k not in TIMED},
    }
    assert outcome.test["examples"] == 11
    assert outcome.note.records["tokens"] > 0


@pytest.mark.smoke
def test_the_model_learns(tmp_path):
    outcome = train(
        tmp_path,
        tiny_config(train=dict(epochs=12, eval_every=12, checkpoint_every=None), model=dict(dropout=0.0)),
    )
    assert outcome.test["accuracy"] > 0.9
    losses = [line["loss"] for line in lines(tmp_path) if line["kind"] == "train"]
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("log_every", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_interruptions_change_nothing(tmp_path, log_every):
    config = tiny_config(train=dict(log_every=log_every))
    whole = train(tmp_path / "whole", config)
    for steps in (1, 4, 6, 2):
        with pytest.raises(Interrupted, match="a test after step"):
            train(tmp_path / "parts", config, StopAfter(steps))
    parts = train(tmp_path / "parts", config)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert same(parts, whole)
    assert parts.note.records["tokens"] == whole.note.records["tokens"]
    last = []
    for name in ("whole", "parts"):
        with Checkpoints(tmp_path / name / "checkpoints") as checkpoints:
            last.append(checkpoints.load(24)[0])
    jax.tree.map(np.testing.assert_array_equal, *last)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_a_run_resumes_from_the_newest_checkpoint_that_is_intact(tmp_path, capsys):
    config = tiny_config(train=dict(epochs=2))
    whole = train(tmp_path / "whole", config)
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", config, StopAfter(9))
    checkpoints = tmp_path / "parts" / "checkpoints"
    largest = max(checkpoints.glob("9/state/**/d/*"), key=lambda path: path.stat().st_size)
    flip(largest)
    capsys.readouterr()
    parts = train(tmp_path / "parts", config)
    err = capsys.readouterr().err
    assert "The checkpoint of step 9 is damaged and left out: the content of state/" in err
    assert "Resuming from the checkpoint of step 8, the newest that is intact." in err
    assert (checkpoints / "9.damaged").is_dir()
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert same(parts, whole)
    for path in checkpoints.glob("*/hashes.json"):
        flip(path)
    with pytest.raises(CheckpointError, match="no checkpoint in .* is intact; restore one"):
        train(tmp_path / "parts", config)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["rsqrt", "wsd"])
def test_an_extended_run_equals_one_that_was_longer_from_its_start(tmp_path, schedule):
    def config(steps):
        return tiny_config(
            optimizer=dict(schedule=schedule, decay_fraction=0.5),
            train=dict(epochs=None, steps=steps, eval_every=1, checkpoint_every=3),
        )

    train(tmp_path / "longer", config(18))
    if schedule == "wsd":  # whose decay from 12 steps begins after step 7
        with pytest.raises(Interrupted):
            train(tmp_path / "extended", config(12), StopAfter(6))
    else:  # it ends, evaluated, where the longer run is not
        train(tmp_path / "extended", config(10))
    train(tmp_path / "extended", config(18))
    assert RunDirectory(tmp_path / "extended").config() == config(18)
    assert lines(tmp_path / "extended") == lines(tmp_path / "longer")
    last = []
    for name in ("longer", "extended"):
        with Checkpoints(tmp_path / name / "checkpoints") as checkpoints:
            last.append(checkpoints.load(18)[0])
    jax.tree.map(np.testing.assert_array_equal, *last)
    if schedule == "wsd":
        message = "the decay of optimizer.schedule='wsd' began after step 10, and .* step 18"
    else:
        message = "can be extended, not shortened: it has 18 steps, and 12 are given"
    with pytest.raises(WorkdirError, match=message):
        train(tmp_path / "extended", config(12 if schedule == "rsqrt" else 24))


def test_a_run_with_cosine_cannot_be_extended(tmp_path):
    plan = experiment.build(tiny_config(train=dict(epochs=5)))
    assert "train anew in another workdir" in plan.extension_problem(tiny_config(), 6)
    same_length = tiny_config(train=dict(epochs=None, steps=30))
    assert plan.extension_problem(same_length, 6) is None


def test_saving_again_compiles_nothing(tmp_path, monkeypatch):
    compiled, at_saves = [], []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    save = loop._Training._save

    def counting(self, *, evaluate):
        before = len(compiled)
        save(self, evaluate=evaluate)
        at_saves.append(len(compiled) - before)

    monkeypatch.setattr(loop._Training, "_save", counting)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        train(tmp_path, tiny_config(train=dict(epochs=2)))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert at_saves[0] > 0  # so that compiling is seen at all
    assert len(at_saves) == 4
    assert not any(at_saves[1:])


def test_batches_without_labels_are_passed_by(tmp_path, capsys):
    config = tiny_config(task=dict(unlabelled=tuple(range(48))), train=dict(epochs=1, checkpoint_every=None))
    train(tmp_path, config)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        arrays = checkpoints.load(6)[0]
    initial = experiment.build(config).step_functions(Devices(jax.devices()[:1])).layout
    first = jax.device_get(initial.to_stored(initial.initial(0)))
    for name in first:
        if name.startswith(("parameters", "average", "statistics")):
            np.testing.assert_array_equal(arrays[name], first[name])
    assert [line["loss"] for line in lines(tmp_path) if line["kind"] == "train"] == [None] * 6
    assert "step 1: the batch has no label" in capsys.readouterr().err


def test_what_training_would_refuse_is_refused_before(monkeypatch):
    """The largest width is traced, not only the shortest, and so are bounds and lengths of all splits."""
    with pytest.raises(ValueError, match="bucket_bounds must be positive and increase"):
        experiment.build(tiny_config(data=dict(bucket_bounds=(8, 4))))
    with pytest.raises(ValueError, match="split 'train': sequence .* more than the last bucket bound"):
        experiment.build(tiny_config(data=dict(bucket_bounds=(2, 5))))
    plan = experiment.build(tiny_config())
    seen = set()

    def loss(outputs, batch):
        seen.add(batch["inputs"].shape[1])
        return 0.0, {"loss": 0.0, "count": 1.0}

    monkeypatch.setattr(plan.task, "loss", loss)
    plan.check(Devices(jax.devices()[:1]))
    assert seen == {8}


def test_a_time_limit_saves_and_leaves(tmp_path):
    with pytest.raises(Interrupted, match="the time limit after step 1 of 24"):
        train(tmp_path, tiny_config(), Stop(after_seconds=1e-6))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps == [1]


def test_losses_that_are_not_finite_stop_at_their_step(tmp_path):
    config = tiny_config(task=dict(poison=20), train=dict(log_every=50))
    batches = experiment.build(config).train_batches()
    poisoned = next(step for step, batch in enumerate(batches, start=1) if batch["poison"].any())
    with pytest.raises(NonFiniteError) as caught:
        train(tmp_path, config)
    assert caught.value.step == poisoned
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert all(step < poisoned for step in checkpoints.steps)


def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
    """The update after a finite loss may overflow."""
    config = tiny_config(optimizer=dict(learning_rate=3.4e38, warmup_steps=0), train=dict(checkpoint_every=1))
    with pytest.raises(NonFiniteError, match=r"step 1: (average|parameters)/\w+"):
        train(tmp_path, config)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps == []


def test_the_best_checkpoint_is_tested(tmp_path):
    config = tiny_config(
        optimizer=dict(ema=None, learning_rate=0.3), train=dict(keep_last=1, checkpoint_every=None)
    )
    outcome = train(tmp_path, config)
    validations = [line for line in lines(tmp_path) if line["kind"] == "validation"]
    best = max(validations, key=lambda line: (line["accuracy"], -line["step"]))
    assert outcome.best_step == best["step"]
    assert outcome.validation["accuracy"] == best["accuracy"]
    plan = experiment.build(config)
    devices = Devices(jax.devices()[:1])
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.best == best["step"]
        functions = plan.step_functions(devices)
        state, _ = loop.restore(functions.layout, checkpoints, best["step"])
    evaluate = Evaluator(plan, functions, devices)
    assert evaluate(state, "test")["loss"] == outcome.test["loss"]


def test_evaluation_counts_every_example_once():
    """In batches of another size, whose last one is filled up, and against the model called on rows one by one."""
    plan = experiment.build(tiny_config(train=dict(eval_batch_size=4)))
    devices = Devices(jax.devices()[:1])
    functions = plan.step_functions(devices)
    state = functions.layout.initial(0)
    got = Evaluator(plan, functions, devices)(state, "test")
    losses = []
    split = plan.task.splits["test"]
    for index in range(len(split)):
        batch = split.gather(np.array([index]), 8) | {"weight": np.ones(1, np.float32)}
        output, _ = plan.model(
            functions.layout.packing.cut(state.parameters), state.statistics, batch, key=None
        )
        losses.append(plan.task.loss(output, batch)[0])
    assert got["examples"] == 11
    np.testing.assert_allclose(got["loss"], np.mean(losses), rtol=1e-5)


def test_evaluation_uses_the_average():
    plan = experiment.build(tiny_config())
    devices = Devices(jax.devices()[:1])
    functions = plan.step_functions(devices)
    state = functions.layout.initial(0)
    moved = {name: 0 * vector for name, vector in state.parameters.items()}
    evaluate = Evaluator(plan, functions, devices)
    losses = [
        evaluate(changed, "test")["loss"]
        for changed in (state, state._replace(parameters=moved), state._replace(average=moved))
    ]
    assert losses[0] == losses[1]
    assert losses[2] == pytest.approx(np.log(3), rel=1e-5)


def test_a_task_may_name_what_selects(monkeypatch):
    plan = experiment.build(tiny_config())
    assert plan.score({"accuracy": 0.25, "loss": 3.0}) == 0.25
    monkeypatch.setattr(plan.task, "selection_metric", ("loss", "min"), raising=False)
    assert plan.score({"accuracy": 0.25, "loss": 3.0}) == -3.0
    monkeypatch.undo()
    plain = dataclasses.replace(plan, metric_names=("count", "loss"))
    assert plain.selection == ("loss", "min")


def test_the_model_may_not_set_what_the_task_gives():
    with pytest.raises(ValueError, match="config.model sets num_classes, which the task gives"):
        experiment.build(tiny_config(model=dict(num_classes=3)))


def test_all_widths_are_compiled_ahead():
    plan = experiment.build(tiny_config())
    widths = {batch["inputs"].shape[1] for batch in plan.train_batches()}
    ahead = {batch["inputs"].shape[1] for batch in plan.example_train_batches()}
    assert widths == ahead == {4, 8}
    for got, expected in zip(plan.example_train_batches()[:1], plan.train_batches()):
        assert {k: v.dtype for k, v in got.items()} == {k: v.dtype for k, v in expected.items()}
