"""The model of a config is checked without data."""

import pytest

from experiments import tasks
from experiments.config.command_line import load
from experiments.config.models import PLACEHOLDERS, abstract_model, check_model, sizes_without_data


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


def test_a_task_that_is_not_registered_is_left_to_make_task():
    check_model(config("no such task"))


def test_nothing_is_allocated():
    model = abstract_model(config(width=2**16, depth=2, pattern=("mamba2",)), PLACEHOLDERS)
    assert model.config.stack.width == 2**16


@pytest.mark.parametrize("path", ["configs/lra/listops.py:mixer=s5", "configs/synthetic/mqar.py:mixer=gla"])
def test_recipes_pass(path):
    check_model(load(path))
