"""Configs of Long Range Arena: their models can be made, with the published numbers, and wrong arguments are refused."""

import pathlib
import runpy

import pytest

from experiments.config.loading import to_plain
from experiments.training.experiment import model_without_data

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "configs/lra"


@pytest.mark.parametrize(
    "name, argument, width, state",
    [
        ("pathfinder", "mixer=s5", 192, 256),
        ("pathfinder", "mixer=s5,size=128", 128, 256),
        ("pathfinder", "mixer=attention", 192, None),
        ("image", "mixer=s5", 512, 384),
        ("image", "mixer=attention", 512, None),
    ],
)
def test_models(name, argument, width, state):
    config = to_plain(runpy.run_path(str(FOLDER / f"{name}.py"))["get_config"](argument))
    model = model_without_data(config)
    assert model.embedding.map.kernel.shape == (1, width)
    assert model.head.kernel.shape == (width, 10 if name == "image" else 2)
    if state is not None:
        assert (model.config.stack.depth, config["model"]["mixers"]["s5"]["state_size"]) == (6, state)


@pytest.mark.parametrize(
    "name, argument, message",
    [
        ("pathfinder", "mixer=s4", "mixer='s4' has no recipe on Pathfinder; available: s5, attention"),
        ("pathfinder", "size=256", "size='256' has no recipe on Pathfinder; available: 32, 128"),
        ("pathfinder", "width=3", "pathfinder.py takes mixer=NAME and size=SIDE, not width"),
        ("image", "size=3", "image.py takes mixer=NAME, not size"),
    ],
)
def test_wrong_arguments_are_refused(name, argument, message):
    with pytest.raises(ValueError, match=message):
        runpy.run_path(str(FOLDER / f"{name}.py"))["get_config"](argument)
