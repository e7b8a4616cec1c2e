"""Rates, biases and scales are not decayed, whatever config trains them, unless it asks."""

import runpy

import pytest
from flax import nnx

from experiments.config.files import shipped
from experiments.config.loading import section, to_plain
from experiments.training.optimizers import OptimizerConfig, assign_groups
from layers.parameters import group_of
from tests.layers.mixers.table import MIXERS
from tests.layers.mixers.test_contract import build, leaves

CONFIGS = sorted(shipped().values())
DECLARED = {name: name for name in ("default", "no_decay", "ssm", "ssm/b", "ssm/dt", "ssm_output")}

# Every parameter of a mixer that is decayed, by the last part of its name. A rate, eigenvalue, step size, frequency, gate bias,
# scale of a norm or bias has no place here.
DECAYED = {
    "kernel",  # of linear maps
    "weight",  # taps of short and lightweight convolutions
    "gates",  # RG-LRU's block-diagonal maps
    "recurrent",  # recurrent maps of LSTM and sLSTM
    "input",  # maps of sLSTM by heads
    "projections",  # Linformer's
    "filter",  # Nystromformer's, over time
    "latents",  # Luna's
    *("long_long_keys", "global_global_keys", "long_global_keys", "global_long_keys"),  # ETC's labels
    "inner",  # HyperMixer's maps
    "outer",
    "query_weight",  # selective attention's maps to temperatures
    "value_weight",
    "c",  # outputs and skips of state space models, which learn as the rest
    "d",
    "shift_c",
    "shift_d",
    "selection",  # maps to the B, C and step sizes of B2S6 and of scans of images
    "dt",  # the second map to step sizes of scans of images
    "beta",  # what MEGA's averages take in and give out
    "eta",
}


@pytest.mark.parametrize("entry", MIXERS)
def test_only_weights_are_decayed(entry):
    config = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1)
    declared = {
        path: group_of(variable)
        for path, variable in leaves(nnx.eval_shape(lambda: build.__wrapped__(entry)))
    }
    chosen, groups = assign_groups(config, declared)
    decayed = {path for path in declared if groups[chosen[path]].weight_decay}
    names = {next(part for part in reversed(path) if isinstance(part, str)) for path in decayed}
    assert names <= DECAYED


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_config_decays_rates_by_omission(path):
    config = section(to_plain(runpy.run_path(str(path))["get_config"]()), "optimizer", OptimizerConfig)
    chosen, groups = assign_groups(config, DECLARED)
    for name in ("no_decay", "ssm", "ssm/dt", "ssm/b"):
        asked = any("weight_decay" in config.groups.get(entry, {}) for entry in (name, name.split("/")[0]))
        assert groups[chosen[name]].weight_decay == 0 or asked
    rate = config.groups.get("ssm", {}).get("learning_rate", config.learning_rate / 3)
    assert groups[chosen["ssm"]].learning_rate == pytest.approx(rate)
