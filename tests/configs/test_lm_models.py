"""The language models: every one is built at every size, and has about the parameters that its size says."""

import pathlib
import runpy

import jax
import pytest
from flax import nnx

from experiments.config.loading import TrainConfig, section, to_plain
from experiments.data.text import official
from experiments.data.text.sources import read_documents
from experiments.tasks import make_task
from experiments.training import experiment
from experiments.training.optimizers import OptimizerConfig
from layers.mixers import MIXERS
from seqmodels import build_model
from tests.layers.mixers.table import NOT_CAUSAL

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
MODELS = runpy.run_path(str(CONFIGS / "lm" / "models.py"))
HYBRIDS = set(runpy.run_path(str(CONFIGS / "hybrids.py"))["MODELS"])
EXPERTS = {"jamba", "hunyuan_turbos", "minimax", "kimi_linear", "kimi_gated", "qwen3_next"}
SIZES = {"10m": 10e6, "40m": 40e6, "125m": 115e6, "350m": 340e6, "1.3b": 1300e6}


def config_of(argument):
    return to_plain(MODELS["get_config"](argument))


def parameters(model):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize(
    "size, every", [("125m", 8), *(pytest.param(size, 1, marks=pytest.mark.slow) for size in SIZES)]
)
def test_parameters_of_every_model(size, every):
    width, blocks, *_ = MODELS["SIZES"][size]
    known = MODELS["models"](width, blocks, 512)
    assert known.keys() >= HYBRIDS
    for name in tuple(known)[::every]:
        config = config_of(f"size={size},mixer={name}")
        section(config, "train", TrainConfig), section(config, "optimizer", OptimizerConfig)
        # One repeat of the pattern tells the parameters of all, but for those that layers share.
        depth = config["model"]["depth"]
        layers = depth if "shared" in config["model"] else min(len(config["model"]["pattern"]), 8, depth)
        values = config["model"] | dict(vocab_size=32768, depth=layers)
        model = nnx.eval_shape(lambda values=values: build_model(values, rngs=nnx.Rngs(0)))
        per_layer = parameters(model.stack) / layers
        count = parameters(model) + per_layer * (depth - layers)
        most = 3.1 if name in EXPERTS else 1.17
        assert 0.9 < count / SIZES[size] < most, (name, count)


def test_models_of_bytes_are_known_without_data(monkeypatch):
    def refuse(name, **_):
        raise AssertionError(f"the data of {name} are not needed")

    monkeypatch.setattr(experiment, "make_task", refuse)
    model = experiment.model_without_data(config_of("size=10m,mixer=rg_lru"))
    assert model.config.input.vocab_size == 257
    with pytest.raises(ValueError, match="the task 'language' tells the sizes of a model only once it has"):
        experiment.model_without_data(config_of("size=10m,mixer=rg_lru,tokenizer=characters"))


def test_every_causal_mixer_fits_the_model_of_the_standard_library():
    get_config = runpy.run_path(str(CONFIGS / "lm" / "stdlib.py"))["get_config"]
    for name in MIXERS:
        config = to_plain(get_config(f"mixer={name},depth=1"))
        if name in NOT_CAUSAL:
            with pytest.raises(ValueError, match="is not causal|needs the option"):
                experiment.model_without_data(config)
        else:
            experiment.model_without_data(config)
    with pytest.raises(ValueError, match="width='wide'; expected a number of at least 1, such as 128"):
        get_config("width=wide")


def test_options():
    config = config_of("size=40m,mixer=hyena,tokenizer=bpe:32768,length=512,rule=muon")
    assert config["model"]["mixers"]["hyena"]["max_length"] == config["task"]["length"] == 512
    assert config["task"]["tokenizer"] == "bpe:32768"
    assert config["optimizer"]["name"] == "muon"
    train = config_of("size=125m,tokens=200m,length=4000")["train"]
    assert train["steps"] == 6250
    assert "epochs" not in train
    for argument, said in (
        ("size=2b", "size='2b' is unknown; available: 10m"),
        ("mixer=mambo", "mixer='mambo' has no model here; available: attention"),
        ("length=0", "length='0'; expected a number of tokens"),
        ("tokens=2g", "tokens='2g'; expected a number of tokens to train on, such as 200m"),
        ("width=3", "models.py takes size="),
        ("source=enwiki8", "source='enwiki8' is unknown; available: stdlib, enwik8"),
    ):
        with pytest.raises(ValueError, match=said):
            MODELS["get_config"](argument)


def test_published_corpora(tmp_path, monkeypatch):
    """The config of a corpus reads the official files, which are small here."""
    monkeypatch.setattr(official, "SIZE", 1000)
    monkeypatch.setattr(official, "CUTS", (900, 950))
    (tmp_path / "text8").write_text("anarchism " * 100)
    task = dict(config_of("source=text8,length=16")["task"])
    task |= dict(official_dir=str(tmp_path), data_dir=str(tmp_path / "data"))
    made = make_task(**task)
    assert made.vocab_size == len(set("anarchism ")) + 2
    assert {name: len(split) for name, split in made.splits.items()} == dict(train=57, validation=4, test=4)
    for source, (given, tokenizer, _) in MODELS["SOURCES"].items():
        task = config_of(f"source={source}")["task"]
        assert (task["source"], task["tokenizer"]) == (given, tokenizer)
        if source != "stdlib":
            with pytest.raises(ValueError, match=f"source='{given}' (needs official_dir|is not prepared in)"):
                read_documents(given, official_dir=tmp_path if given.startswith("tfds:") else None)
