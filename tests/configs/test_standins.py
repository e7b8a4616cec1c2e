"""Configs of the stand-ins: their models can be made with mixers of every family, and wrong arguments are refused."""

import pathlib
import runpy

import pytest

from experiments.config.loading import to_plain
from experiments.training.experiment import model_without_data
from layers.mixers import MIXERS

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "configs/standins"


def load(name, argument=""):
    return to_plain(runpy.run_path(str(FOLDER / f"{name}.py"))["get_config"](argument))


@pytest.mark.parametrize(
    "mixer",
    ["s5", "dss", "mega", "attention", "linformer", "hyena", "mamba2", "moba", "power_attention", "rwkv7"],
)
def test_any_mixer_by_name(mixer):
    model = model_without_data(load("smnist", f"mixer={mixer},width=64,depth=2"))
    assert model.embedding.map.kernel.shape == (1, 64)
    assert model.head.kernel.shape == (64, 10)


@pytest.mark.sample(3)
@pytest.mark.slow
@pytest.mark.parametrize(
    "mixer", sorted(MIXERS.keys() - {"bidirectional", "cross_scan", "parallel", "tuned_state"})
)
def test_every_mixer_that_needs_no_option(mixer):
    model_without_data(load("package_text", f"mixer={mixer}"))


@pytest.mark.parametrize("argument", ["", "mixer=cross_scan,inner=gla", "mixer=s4nd,data=cifar10"])
def test_images_have_rows(argument):
    model = model_without_data(load("images", f"{argument},width=64,depth=2"))
    colours, columns = (3, 32) if "cifar10" in argument else (1, 28)
    assert model.embedding.map.kernel.shape == (colours, 64)
    assert model.stack.layers[0].mixer.config.columns == columns


def test_pairs_have_a_dual_encoder_and_orders_their_task():
    model = model_without_data(load("package_pairs", "mixer=s5"))
    assert [layer.kernel.shape for layer in model.head] == [(4 * 96, 96), (96, 2)]
    assert model_without_data(load("package_text")).head.kernel.shape == (96, 8)
    assert load("package_text", "length=64")["task"] == dict(name="package_text", length=64)
    assert load("emails", "part=body,length=99")["task"] == dict(
        name="emails", package=None, part="body", length=99
    )
    assert load("images", "orders=snake+column")["model"]["mixers"] == {
        "vmamba": dict(columns=28, orders=("snake", "column"))
    }
    assert load("smnist", "order=permuted")["task"]["permuted"] is True


@pytest.mark.parametrize(
    "name, argument, message",
    [
        ("smnist", "order=random", "order='random'; expected rows or permuted"),
        (
            "smnist",
            "length=3",
            "smnist.py takes mixer, width, depth, learning_rate, order, epochs, not length",
        ),
        ("images", "mixer=attention", "mixer='attention' is not one of vmamba, msvmamba, s4nd, cross_scan"),
        ("images", "data=svhn", "data='svhn'; expected digits or cifar10"),
        ("images", "mixer=s4nd,orders=snake", "orders=snake; only vmamba and cross_scan have scan orders"),
        ("images", "inner=s5", "inner=s5; only cross_scan takes a mixer"),
        ("package_text", "width=wide", "width='wide'; expected a number, such as 96"),
        ("package_pairs", "order=rows", "package_pairs.py takes mixer, width"),
    ],
)
def test_wrong_arguments_are_refused(name, argument, message):
    with pytest.raises(ValueError, match=message):
        load(name, argument)
