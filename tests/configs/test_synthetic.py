"""The configs of synthetic tasks: every causal mixer can be named, and every argument reaches its place."""

import functools
import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from experiments.config.loading import DataConfig, TrainConfig, section, to_plain
from experiments.tasks import make_task
from experiments.training.experiment import model_without_data
from experiments.training.optimizers import OptimizerConfig, assign_groups
from layers.mixers import MIXERS
from layers.parameters import group_of
from tests.layers.mixers.table import NOT_CAUSAL

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "configs" / "synthetic"
MAD = (
    "in_context_recall",
    "noisy_recall",
    "fuzzy_recall",
    "selective_copying",
    "compression",
    "memorization",
)
SCALES = [
    *(f"{name}:scale={scale}" for name in ("mqar", "selective_copying", "induction_heads") for scale in ("small", "paper")),
    "mqar:scale=paper,length=512",
    "associative_recall:",
    "associative_recall:scale=long",
    *(f"mad:task={task}" for task in MAD),
    "mad:scale=paper,task=memorization",
    "linear_regression:",
    "linear_regression:scale=paper",
    "source_target:",
    "source_target:delete=0.5",
    "source_target:task=copy,scale=paper,mixer=gla,encoder=nystromformer",
    "pointing:",
    "pointing:task=hull,reader=set,process=2,glimpse=yes,mixer=attention",
    "regular_languages:",
    "regular_languages:scale=paper",
    "state_tracking:",
    "state_tracking:scale=paper,group=S5,moved=2,mixer=mamba3",
    *(f"algorithms:task={task}" for task in (
        "copy", "copy_unique", "count", "mode", "parity", "running_parity", "sorting", "sorting_hints", "addition", "addition_hints",
    )),
    "algorithms:task=running_parity,mixer=attention,segment=5,memory=2",
    "algorithms:task=running_parity,mixer=attention,segment=5,recall=8",
    *(f"algorithms:task={task},scale=paper" for task in ("copy", "count", "mode", "parity", "sorting", "addition", "addition_hints")),
]  # fmt: skip


@functools.cache
def loaded(name):
    return runpy.run_path(str(FOLDER / f"{name}.py"))["get_config"]


def plain(config):
    name, _, arg = config.partition(":")
    return to_plain(loaded(name)(arg))


@pytest.mark.parametrize("config", SCALES)
def test_every_section_holds(config):
    found = plain(config)
    train = section(found, "train", TrainConfig)
    data = section(found, "data", DataConfig)
    optimizer = section(found, "optimizer", OptimizerConfig)
    options = dict(found["task"])
    task = make_task(options.pop("name"), **options)
    assert train.batch_size <= task.train
    width = max(task.width(split) for split in task.splits)
    assert data.bucket_bounds is None or data.bucket_bounds[-1] == width
    model = model_without_data(found)
    parameters = nnx.to_flat_state(nnx.state(model, nnx.Param))
    assign_groups(optimizer, {path: group_of(variable) for path, variable in parameters})


@pytest.mark.slow
@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_every_causal_mixer_can_be_named(mixer):
    for name in ("mqar", "selective_copying", "associative_recall", "mad", "algorithms", "state_tracking"):
        config = plain(f"{name}:mixer={mixer}")
        if mixer in NOT_CAUSAL:
            with pytest.raises(ValueError, match=r"is not causal|needs the option"):
                model_without_data(config)
            continue
        model = model_without_data(config)
        vocabulary = model.config.input.vocab_size
        tokens = jax.ShapeDtypeStruct((1, 42), jnp.int32)
        graph, variables = nnx.split(model)
        shape = jax.eval_shape(lambda v, x: nnx.merge(graph, v)(x)[0], variables, tokens)
        assert shape.shape == (1, 42, vocabulary)


def test_arguments_reach_their_places():
    config = plain("mqar:mixer=hyena,width=32,depth=3,learning_rate=2e-4,scale=paper,length=256")
    assert config["model"]["pattern"] == ("hyena",)
    assert (config["model"]["width"], config["model"]["depth"]) == (32, 3)
    assert config["optimizer"]["learning_rate"] == 2e-4
    assert config["task"] == dict(name="mqar", vocab_size=8192, length=256, pairs=16)
    config = plain("selective_copying:mixer=hyena,scale=paper")
    assert config["model"]["mixers"] == {"hyena": {"max_length": 4128}}
    for mixer, channel in (("s4d", "full_glu"), ("mamba", "none")):
        assert plain(f"induction_heads:mixer={mixer}")["model"]["channel"] == channel
    assert plain("mad:task=compression")["model"]["kind"] == "autoencoder"
    assert plain("algorithms:task=running_parity")["task"]["running"] is True


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.py")))
def test_errors(name):
    with pytest.raises(ValueError, match=rf"{name}.py takes .*mixer.*, not mixr"):
        loaded(name)("mixr=s5")
    if name == "oscillations":
        with pytest.raises(ValueError, match="width='wide'; expected a number, such as 32"):
            loaded(name)("width=wide")
    else:
        with pytest.raises(ValueError, match="scale=large"):
            loaded(name)("scale=large")
