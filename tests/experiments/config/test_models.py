"""The model of a config is checked without data."""

import numpy as np
import pytest

from experiments import tasks
from experiments.config.command_line import load
from experiments.config.models import (
    PLACEHOLDERS,
    abstract_model,
    check_kind,
    check_model,
    check_positions,
    sizes_without_data,
)
from experiments.training import experiment


class LateTask:
    """Knows its sizes only once it has its data."""

    def __init__(self):
        raise AssertionError("the data are not needed")


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "late", LateTask)
    monkeypatch.setattr(tasks.ListOps, "__init__", LateTask.__init__)


def config(task="listops", **model):
    base = dict(kind="classifier", width=8, depth=1, pattern=("attention",), mixer_defaults=dict(heads=2))
    return dict(seed=0, task=dict(name=task), model=base | model)


@pytest.mark.parametrize("task", ["listops", "late"])
@pytest.mark.parametrize(
    "model, error, message",
    [
        (dict(widht=8), ValueError, "model has no field 'widht'; did you mean 'width'"),
        (dict(pattern=("s6",)), ValueError, "unknown mixer 's6'"),
        (dict(kind="classifer"), ValueError, "kind='classifer'; did you mean 'classifier'"),
        (dict(mixers={"attention": dict(heads=3)}), ValueError, "heads=3"),
        (dict(mixers={"attention": dict(head=2)}), ValueError, "no option 'head'; did you mean 'heads'"),
        (dict(param_dtype="float16"), ValueError, "param_dtype='float16'.*expected float32 or bfloat16"),
        (dict(dtype="float8"), ValueError, "float8"),
    ],
)
def test_a_section_that_makes_no_sense_is_named_before_there_are_data(task, model, error, message):
    with pytest.raises(error, match=message):
        check_model(config(task, **model))


@pytest.mark.parametrize("kind", ["classifier", "language_model", "autoencoder"])
def test_a_section_that_makes_sense_passes(kind):
    check_model(config("late", kind=kind))
    assert check_model(config("listops")) is None


def test_sizes_are_those_of_the_task_and_are_not_set_twice():
    assert sizes_without_data(config()) == dict(vocab_size=16, num_classes=10)
    assert sizes_without_data(config("late")) == {}
    with pytest.raises(ValueError, match="config.model sets num_classes, which the task gives"):
        check_model(config(num_classes=3))
    with pytest.raises(ValueError, match="config.task has no 'name'"):
        check_model(config() | dict(task={}))


def test_kinds_of_models_fit_the_labels_of_the_task():
    sizes = dict(vocab_size=9)
    check_kind(config(num_classes=3), sizes)
    check_kind(config(kind="language_model"), sizes)
    with pytest.raises(ValueError, match="the labels of the task 'listops' belong to tokens, not to rows"):
        check_kind(config(), sizes)
    with pytest.raises(
        ValueError, match="kind='autoencoder', but the task 'listops' has one label per row, of 10"
    ):
        check_model(config(kind="autoencoder"))
    with pytest.raises(ValueError, match="sets input_size, but the inputs of the task 'listops' are tokens"):
        check_model(config(input_size=3))


def test_rows_longer_than_the_table_of_positions_are_named():
    lengths = np.array([3, 8, 5])
    check_positions(config(), "train", lengths)
    check_positions(config(max_positions=8), "train", lengths)
    with pytest.raises(
        ValueError, match="max_positions=7, but the longest row of the split 'test' has 8 tokens"
    ):
        check_positions(config(max_positions=7), "test", lengths)


def test_an_experiment_refuses_rows_that_its_model_cannot_take():
    mqar = ["task.length=32", "task.pairs=4", "task.train=64"]
    learned = [
        *mqar,
        "model.absolute_positions=learned",
        "model.max_positions=32",
        "task.extrapolate=((64, 8),)",
    ]
    overrides = [tuple(text.split("=", 1)) for text in learned]
    plan = experiment.build(load("configs/synthetic/mqar.py", overrides))
    plan.eval_batches("test")
    (longer,) = plan.task.splits.keys() - {"train", "validation", "test"}
    with pytest.raises(ValueError, match=f"the longest row of the split '{longer}' has 64 tokens"):
        plan.eval_batches(longer)
    linformer = [*mqar, "model.kind=autoencoder", "model.pattern=linformer", "model.mixer_defaults={}"]
    linformer += ["model.mixers={'linformer': {'max_length': 31, 'heads': 2}}"]
    overrides = [tuple(text.split("=", 1)) for text in linformer]
    with pytest.raises(ValueError, match="x has 32 tokens; Linformer was made for max_length=31"):
        experiment.build(load("configs/synthetic/mqar.py", overrides))


def test_a_task_that_is_not_registered_is_left_to_make_task():
    check_model(config("no such task"))


def test_nothing_is_allocated():
    model = abstract_model(config(width=2**16, depth=2, pattern=("mamba2",)), PLACEHOLDERS)
    assert model.config.stack.width == 2**16


@pytest.mark.parametrize("path", ["configs/lra/listops.py:mixer=s5", "configs/synthetic/mqar.py:mixer=gla"])
def test_recipes_pass(path):
    check_model(load(path))
