"""Configs of Long Range Arena: the published numbers, every mixer on every task takes a step, wrong arguments are refused."""

import pathlib
import random
import runpy

import jax
import numpy as np
import pytest

from experiments.config.loading import TrainConfig, section, to_plain
from experiments.parallel.mesh import Devices
from experiments.tasks.classification import cross_entropy
from experiments.training.experiment import model_without_data, sizes_without_data, with_sizes
from experiments.training.model import SplitModel
from experiments.training.optimizers import Optimizer, OptimizerConfig
from experiments.training.step import StepFunctions, metric_names_of
from seqmodels import build_model

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "configs/lra"
RECIPES = runpy.run_path(str(FOLDER / "_recipes.py"))
TASKS = {
    "listops": ("listops", ""),
    "text": ("text", ""),
    "retrieval": ("retrieval", ""),
    "image": ("image", ""),
    "pathfinder": ("pathfinder", ""),
    "pathx": ("pathfinder", ",size=128"),
    "path256": ("pathfinder", ",size=256"),
}
ON_ONE_TASK = {mixer: list(TASKS)[number % len(TASKS)] for number, mixer in enumerate(RECIPES["SPARSE"])}
ALL = [
    (task, f"mixer={mixer},protocol={protocol}")
    for task in TASKS
    for protocol, mixers in RECIPES["MIXERS"].items()
    for mixer in mixers
    # Of recipes that differ by the length alone, each takes a step on one task.
    if mixer not in ON_ONE_TASK or ON_ONE_TASK[mixer] == task
]
TIME = 12
# Options that set a size, and what they become in a model that is tiny.
TINY = dict(
    state_size=4, blocks=1, systems=1, heads=2, max_length=TIME, key_dim=4, value_dim=8, averages=2, chunk=4
) | dict(window=4, projected=3, hidden=8, features=4, max_positions=TIME, taps=2)


def load(task, argument):
    name, more = TASKS[task]
    return to_plain(runpy.run_path(str(FOLDER / f"{name}.py"))["get_config"](argument + more))


def shrunk(values):
    """The fields of a model, or of a mixer, with tiny sizes; head sizes follow from the width."""
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found[name] = shrunk(value)
        elif name != "head_dim":
            found[name] = value if value is None else TINY.get(name, value)
    return found


def tiny(config):
    model = shrunk(config["model"]) | dict(width=16, depth=1)
    for options in model["mixers"].values():
        if options.get("heads") and "mamba2" in model["pattern"]:
            del options["heads"]
    if "mamba2" in model["mixers"]:
        model["mixers"]["mamba2"]["head_dim"] = 8
    if "head_sizes" in model:
        model["head_sizes"] = (6, 3)
    return model


def batch_of(model, config):
    rng = np.random.default_rng(0)
    rows = (4, 2) if config["model"]["kind"] == "dual_encoder" else (4,)
    if "input_size" in model:
        inputs = rng.standard_normal((*rows, TIME, model["input_size"])).astype(np.float32)
        ids = {}
    else:
        inputs = rng.integers(0, model["vocab_size"], (*rows, TIME)).astype(np.int32)
        lengths = rng.integers(1, TIME + 1, rows)
        ids = dict(segment_ids=(np.arange(TIME) < lengths[..., None]).astype(np.int32))
    labels = rng.integers(0, model["num_classes"], 4).astype(np.int32)
    return dict(inputs=inputs, labels=labels, weight=np.ones(4, np.float32), **ids)


SAMPLE = random.Random(3).sample(ALL, 3)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "task, argument",
    [pytest.param(*pair, marks=[] if pair in SAMPLE else [pytest.mark.slow]) for pair in ALL],
)
def test_every_mixer_takes_a_step_on_every_task(task, argument):
    config = load(task, argument)
    section(config, "train", TrainConfig)
    values = with_sizes(config | dict(model=tiny(config)), sizes_without_data(config))
    model = SplitModel(lambda rngs: build_model(values, rngs=rngs), padding="end", packed=False)
    optimizer = Optimizer(
        section(config, "optimizer", OptimizerConfig), model.parameters, warmup_steps=0, total_steps=10
    )
    batch = batch_of(values, config)
    devices = Devices(jax.devices()[:1])
    functions = StepFunctions(
        model,
        optimizer,
        cross_entropy,
        metric_names=metric_names_of(model, cross_entropy, batch),
        devices=devices,
    )
    state = jax.jit(functions.layout.make)(jax.random.key(0))
    before = jax.device_get(state.parameters)
    state, metrics = functions.train(state, devices.put_batch(batch))
    assert np.all(np.isfinite(metrics))
    after = jax.device_get(state.parameters)
    assert any(np.any(after[name] != before[name]) for name in before)


@pytest.mark.parametrize(
    "task, argument, depth, width, batch, options",
    [
        ("listops", "mixer=s5", 8, 128, 50, dict(state_size=16, blocks=8)),
        ("text", "mixer=s5", 6, 256, 50, dict(state_size=192, blocks=12)),
        ("retrieval", "mixer=s5", 6, 128, 32, dict(state_size=256, blocks=16)),
        ("image", "mixer=s5", 6, 512, 50, dict(state_size=384, clip_eigs=True)),
        ("pathfinder", "mixer=s5", 6, 192, 64, dict(state_size=256, blocks=8)),
        ("pathx", "mixer=s5", 6, 128, 32, dict(state_size=256, dt_min=1e-4)),
        ("text", "mixer=s4", 6, 256, 16, dict(state_size=4)),
        ("image", "mixer=s4", 6, 512, 50, dict(state_size=64)),
        ("retrieval", "mixer=mega", 6, 128, 64, dict(value_dim=256, max_length=4000)),
        ("image", "mixer=mega_chunk", 8, 160, 50, dict(key_dim=96, chunk=128)),
        ("text", "mixer=attention,protocol=lra", 4, 256, 32, dict(heads=4)),
    ],
)
def test_published_sizes(task, argument, depth, width, batch, options):
    config = load(task, argument)
    (found,) = config["model"]["mixers"].values()
    assert (config["model"]["depth"], config["model"]["width"]) == (depth, width)
    assert config["train"]["batch_size"] == batch
    assert {name: found[name] for name in options} == options


def test_rates_of_s5_and_s4():
    # S5's scripts: dt with the global rate and decay on Text; B at the global rate on ListOps; S4: A and B at 0.001.
    text = load("text", "mixer=s5")["optimizer"]
    assert (text["learning_rate"], text["groups"]["ssm"]) == (4e-3, dict(learning_rate=1e-3))
    assert text["groups"]["ssm/dt"] == dict(learning_rate=4e-3, weight_decay=0.07)
    retrieval = load("retrieval", "mixer=s5")["optimizer"]
    assert (retrieval["learning_rate"], retrieval["weight_decay"], retrieval["warmup_epochs"]) == (
        2e-3,
        0.05,
        1,
    )
    s4 = load("pathx", "mixer=s4")
    assert s4["optimizer"]["groups"] == {"ssm": dict(learning_rate=1e-3)}
    assert s4["optimizer"]["warmup_epochs"] == 5
    lra = load("text", "mixer=attention,protocol=lra")["optimizer"]
    assert lra["learning_rate"] == pytest.approx(0.05 / 8000**0.5)


def test_inputs_follow_the_protocol():
    sizes = {
        (task, protocol): sizes_without_data(load(task, f"mixer=attention,protocol={protocol}"))
        for task in TASKS
        for protocol in ("s4", "lra")
    }
    assert sizes["text", "s4"] == dict(num_classes=2, vocab_size=135)
    assert sizes["text", "lra"] == sizes["retrieval", "lra"] == dict(num_classes=2, vocab_size=257)
    assert sizes["retrieval", "s4"] == dict(num_classes=2, vocab_size=98)
    assert sizes["image", "s4"] == dict(num_classes=10, input_size=1)
    assert sizes["pathfinder", "lra"] == dict(num_classes=2, vocab_size=256)
    protocols = {load(*pair)["train"]["protocol"] for pair in SAMPLE}
    assert protocols <= {"s4", "lra"}


@pytest.mark.parametrize("task, argument", [("text", "mixer=s5"), ("retrieval", "mixer=s5")])
def test_models_have_the_parameters_of_the_paper(task, argument):
    model = model_without_data(load(task, argument))
    assert model.embedding.table.shape == ((135, 256) if task == "text" else (98, 128))


@pytest.mark.parametrize(
    "name, argument, message",
    [
        (
            "pathfinder",
            "mixer=s6",
            "mixer='s6' has no recipe of the protocol 's4'; available: attention, b2s6, bigbird, bimamba, core_context, dss",
        ),
        (
            "text",
            "mixer=s5,protocol=lra",
            "mixer='s5' has no recipe of the protocol 'lra'; available: attention",
        ),
        ("text", "protocol=jax", "protocol='jax'; expected s4 or lra"),
        ("pathfinder", "size=64", "size='64' has no recipe on Pathfinder; available: 32, 128, 256"),
        ("pathfinder", "width=3", r"pathfinder.py takes mixer=NAME, protocol=s4\|lra, size=..., not width"),
        ("image", "size=3", r"image.py takes mixer=NAME, protocol=s4\|lra, not size"),
    ],
)
def test_wrong_arguments_are_refused(name, argument, message):
    with pytest.raises(ValueError, match=message):
        runpy.run_path(str(FOLDER / f"{name}.py"))["get_config"](argument)
