"""Configs as plain data."""

import pytest
from ml_collections import ConfigDict

from experiments.config import loading as config_loading
from experiments.config.loading import (
    DataConfig,
    MeshConfig,
    TrainConfig,
    differences,
    from_json,
    to_json,
    to_plain,
)
from tests.experiments.tiny import tiny_config


def test_a_config_survives_json():
    config = to_plain(
        tiny_config(data=dict(bucket_bounds=(3, 8)), model=dict(nested=dict(pair=(1, (2.5, "x")))))
    )
    assert from_json(to_json(config)) == config
    assert config["data"]["bucket_bounds"] == (3, 8)


def test_a_config_dict_and_its_plain_form_are_the_same():
    assert to_plain(ConfigDict(tiny_config())) == to_plain(tiny_config())


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(seed=-1), ValueError, "config.seed=-1"),
        (dict(seed=1.5), ValueError, "config.seed=1.5"),
        (dict(optimiser={}), ValueError, "unknown section 'optimiser'; did you mean 'optimizer'"),
        (dict(model=3), TypeError, "config.model=3; expected a dict"),
        (dict(model=dict(f=print)), TypeError, "config.model.f=.*numbers, strings"),
        (dict(model=dict(x=float("inf"))), ValueError, "config.model.x=inf"),
        (dict(model={1: 2}), TypeError, "config.model has the key 1"),
    ],
)
def test_what_is_no_config_is_named(change, error, message):
    with pytest.raises(error, match=message):
        to_plain(tiny_config() | change)


def test_a_missing_section_is_named():
    config = tiny_config()
    del config["train"]
    with pytest.raises(ValueError, match="no 'train'"):
        to_plain(config)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(batch_size=0), ValueError, "train.batch_size=0; expected at least 1"),
        (dict(batch_size=8.0), TypeError, "train.batch_size=8.0; expected an integer"),
        (dict(steps=10), ValueError, "train.epochs=4 and train.steps=10; set one"),
        (dict(epochs=None), ValueError, "set one of the two"),
        (dict(accumulate=3), ValueError, "accumulate=3 does not divide train.batch_size=8"),
        (dict(eval_every=0), ValueError, "train.eval_every=0"),
        (dict(log_every=True), TypeError, "train.log_every=True"),
        (dict(checkpoint_every=0), ValueError, "train.checkpoint_every=0"),
        (dict(bach_size=8), ValueError, "no option 'bach_size'; did you mean 'batch_size'"),
    ],
)
def test_impossible_training_options_are_named(change, error, message):
    config = tiny_config(train=change)
    with pytest.raises(error, match=message):
        config_loading.section(config, "train", TrainConfig)


def test_impossible_data_options_are_named():
    with pytest.raises(ValueError, match="data.prefetch=-1"):
        config_loading.section(tiny_config(data=dict(prefetch=-1)), "data", DataConfig)


@pytest.mark.parametrize(
    "sizes, error, message",
    [
        (dict(data=0), ValueError, "mesh.data=0; expected at least 1"),
        (dict(fsdp=-2), ValueError, "mesh.fsdp=-2; expected at least 1"),
        (dict(tensor=2.0), TypeError, "mesh.tensor=2.0; expected an integer"),
        (dict(expert=True), TypeError, "mesh.expert=True; expected an integer"),
        (dict(data=-1, sequence=-1), ValueError, "mesh.data and mesh.sequence are -1; only one"),
        (dict(pipeline=2), ValueError, "config.mesh has no option 'pipeline'"),
    ],
)
def test_impossible_meshes_are_named(sizes, error, message):
    with pytest.raises(error, match=message):
        config_loading.section(tiny_config(mesh=sizes), "mesh", MeshConfig)


def test_a_mesh_may_be_left_out_and_may_differ_when_a_run_is_resumed():
    old = tiny_config()
    del old["mesh"]
    run = from_json(to_json(old))
    assert config_loading.section(run, "mesh", MeshConfig) == MeshConfig(-1, 1, 1, 1, 1)
    given = tiny_config(mesh=dict(data=1, fsdp=-1))
    assert config_loading.section(given, "mesh", MeshConfig).fsdp == -1
    assert differences(run, given) == differences(given, run) == []


def test_differences_name_the_field_and_both_values():
    run = tiny_config(train=dict(batch_size=8), model=dict(dropout=0.2))
    given = tiny_config(train=dict(batch_size=16), model=dict(dropout=0.2, width=6))
    assert differences(run, given) == [
        "config.model.width: not set in the run, 6 given",
        "config.train.batch_size: 8 in the run, 16 given",
    ]


def test_fields_that_cannot_change_the_result_may_differ():
    given = tiny_config(
        train=dict(log_every=7, keep_last=5, checkpoint_every=None),
        data=dict(prefetch=3),
        task=dict(data_dir="x"),
    )
    assert differences(tiny_config(), given) == []
    assert differences(tiny_config(), tiny_config(seed=1)) == ["config.seed: 0 in the run, 1 given"]
