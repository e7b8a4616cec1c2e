"""Overrides of the config on the command line, and what is refused there."""

import argparse
import re
import runpy
import subprocess
import sys

import jax
import pytest

from experiments import compare, evaluate, train
from experiments.config.command_line import (
    EXIT_REFUSED,
    NO_BACKEND,
    Parser,
    load,
    names,
    reporting,
    split_overrides,
)
from experiments.config.files import shipped
from experiments.sweep import __main__ as sweep

S5 = "configs/lra/listops.py:mixer=s5"
ATTENTION = "configs/lra/listops.py:mixer=attention"
HYBRID = "configs/hybrids.py:mixer=masformer"
MQAR = "configs/synthetic/mqar.py:mixer=gla"


def parsed(config, *overrides):
    return (
        Parser("command", "Says what it does.", config=True)
        .parse_args([f"--config={config}", *overrides])
        .config
    )


@pytest.mark.parametrize(
    "config, override, value",
    [
        # Fields that the file leaves out, by type.
        (S5, "train.accumulate=2", 2),
        (S5, "train.eval_every=2", 2.0),
        (S5, "train.wandb=sequences", "sequences"),
        (S5, "train.tensorboard=false", False),
        (S5, "optimizer.clip_norm=1", 1.0),
        (S5, "optimizer.ema=0.99", 0.99),
        (S5, "mesh.fsdp=4", 4),
        (S5, "model.remat=dots", "dots"),
        (S5, "model.param_dtype=bfloat16", "bfloat16"),
        (S5, "model.max_positions=none", None),
        (S5, "model.max_positions=64", 64),
        (S5, "model.pooling=last", "last"),
        # Fields that it sets.
        (S5, "seed=7", 7),
        (S5, "model.dtype=bfloat16", "bfloat16"),
        (S5, "train.epochs=none", None),
        (S5, "data.bucket_bounds=(1024, 2048)", (1024, 2048)),
        (S5, "data.bucket_bounds=1024,2048", (1024, 2048)),
        (S5, "data.bucket_bounds=2048", (2048,)),
        (S5, "data.bucket_bounds=none", None),
        (MQAR, "model.pattern=gla,attention+none", ("gla", "attention+none")),
        # What a mapping holds.
        (S5, "optimizer.groups.ssm/dt.learning_rate=1", 1.0),
        (S5, "model.mixers.s5.state_size=32", 32),
        (S5, "model.mixers.s5.conj_sym=0", False),
        (S5, "model.channels.half_glu2.dropout=0.1", 0.1),
        (S5, "model.norm_options.epsilon=1e-3", 1e-3),
        (S5, "model.mixer_defaults.heads=4", 4),
        (S5, "model.mixers={'s5': {'state_size': 4}}", {"s5": {"state_size": 4}}),
        (HYBRID, "model.mixers.local.window=16", 16),
        (ATTENTION, "model.mixers.attention.position=t5", "t5"),
        (ATTENTION, "model.mixers.attention.position.fraction=0.25", 0.25),
        (ATTENTION, "model.mixers.attention.position={'name': 't5'}", {"name": "t5"}),
        # Options of the task, by its constructor.
        (S5, "task.preset=short", "short"),
        (S5, "task.train=100", 100),
        (MQAR, "task.extrapolate=((126, 4), (254, 8))", ((126, 4), (254, 8))),
    ],
)
def test_every_field_can_be_set(config, override, value):
    found = parsed(config, f"--config.{override}")
    for name in override.partition("=")[0].split("."):
        found = found[name]
    assert found == value
    assert type(found) is type(value)


def test_what_is_not_overridden_stays():
    changed = parsed(S5, "--config.model.mixers.s5.state_size=32")
    assert changed["model"]["mixers"]["s5"] == load(S5)["model"]["mixers"]["s5"] | {"state_size": 32}
    assert {**changed, "model": None} == {**load(S5), "model": None}


def test_a_position_keeps_its_name():
    position = {"name": "rope", "fraction": 0.25}
    override = "--config.model.mixers.attention.position.fraction=0.25"
    assert parsed(ATTENTION, override)["model"]["mixers"]["attention"]["position"] == position


def test_the_options_of_an_inner_mixer_can_be_set():
    model = parsed(
        "configs/lra/listops.py",
        "--config.model.pattern=bidirectional",
        "--config.model.mixers={}",
        "--config.model.mixers.bidirectional.inner=mamba",
        "--config.model.mixers.bidirectional.options.state_size=4",
    )["model"]
    assert model["mixers"] == {"bidirectional": {"inner": "mamba", "options": {"state_size": 4}}}


def test_later_overrides_win_and_stand_anywhere():
    given = [
        "--config.train.epochs=1",
        f"--config={S5}",
        "--config.train.epochs",
        "3",
        "--noconfig.model.scan",
    ]
    config = Parser("command", "", config=True).parse_args(given).config
    assert config["train"]["epochs"] == 3
    assert config["model"]["scan"] is False
    assert split_overrides(["--config.model.scan", "--rows", "--config.a.b=c=d"]) == (
        ["--rows"],
        [("model.scan", "true"), ("a.b", "c=d")],
    )


def test_names_are_separated_by_commas():
    assert names('real, Mamba-2,"4 taps, SiLU"') == ("real", "Mamba-2", "4 taps, SiLU")
    for empty in ("", "s5,", " , s5"):
        with pytest.raises(argparse.ArgumentTypeError, match="a name is empty"):
            names(empty)


@pytest.mark.parametrize(
    "config, override, words",
    [
        (S5, "model.dtypo=bfloat16", "config.model has no field 'dtypo'; did you mean 'dtype'?"),
        (S5, "modle.dtype=bfloat16", "config has no field 'modle'; did you mean 'model'?"),
        (S5, "train.bach_size=4", "config.train has no field 'bach_size'; did you mean 'batch_size'?"),
        (S5, "optimizer.clip=1", "config.optimizer has no field 'clip'; did you mean 'clip_norm'?"),
        (S5, "data.prefetsch=1", "config.data has no field 'prefetsch'; did you mean 'prefetch'?"),
        (S5, "mesh.tensors=1", "config.mesh has no field 'tensors'; did you mean 'tensor'?"),
        (S5, "mesh.x=1", "config.mesh has no field 'x'; fields: data, fsdp, tensor, sequence, expert"),
        (S5, "task.presets=short", "config.task has no field 'presets'; did you mean 'preset'?"),
        (S5, "model.mixers.s4.state_size=4", "config.model.mixers has no field 's4'; fields: s5"),
        (
            S5,
            "model.mixers.s5.state=4",
            "config.model.mixers.s5 has no field 'state'; did you mean 'state_size'?",
        ),
        (
            S5,
            "model.mixer_defaults.head=4",
            "config.model.mixer_defaults has no field 'head'; did you mean 'heads'?",
        ),
        (
            S5,
            "model.norm_options.epsilom=4",
            "config.model.norm_options has no field 'epsilom'; did you mean 'epsilon'?",
        ),
        (
            ATTENTION,
            "model.mixers.attention.position.fractoin=1",
            "config.model.mixers.attention.position has no field 'fractoin'; did you mean 'fraction'?",
        ),
        (S5, "seed.x=1", "config.seed has no fields of its own"),
        (S5, "train.epochs=2.5", "config.train.epochs='2.5'; expected an integer or none"),
        (S5, "train.batch_size=none", "config.train.batch_size='none'; expected an integer"),
        (S5, "optimizer.ema=much", "config.optimizer.ema='much'; expected a number or none"),
        (S5, "train.tensorboard=maybe", "config.train.tensorboard='maybe'; expected true or false"),
        (
            S5,
            "model.remat=ful",
            "config.model.remat='ful'; expected one of none, full, dots, attention; did you mean 'full'?",
        ),
        (S5, "model.mixers=s5", "config.model.mixers='s5'; expected a dict"),
        (ATTENTION, "data.bucket_bounds=a,b", "config.data.bucket_bounds='a,b'; expected an integer or none"),
        (MQAR, "task.extrapolate=((1,),)", "config.task.extrapolate='((1,),)'; expected 2 values"),
        ("configs/lra/listops.py:s5", "seed=1", "the argument 's5' is not KEY=VALUE, such as mixer=s5"),
        ("configs/lra/no.py:mixer=s5", "seed=1", "there is no file configs/lra/no.py"),
        ("experiments/train.py", "seed=1", "the file defines no get_config"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(config, override, words, capsys):
    with pytest.raises(SystemExit) as caught:
        parsed(config, f"--config.{override}")
    assert caught.value.code == EXIT_REFUSED
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert words in said[0]


def test_what_the_config_refuses_itself_is_named(capsys):
    with pytest.raises(SystemExit) as caught:
        parsed("configs/lra/listops.py:mixr=s5")
    assert caught.value.code == EXIT_REFUSED
    assert "listops.py takes mixer=NAME, protocol=s4|lra, not mixr" in capsys.readouterr().err


@pytest.mark.parametrize("name", shipped())
def test_every_config_says_so_where_an_argument_has_no_name(name):
    get_config = runpy.run_path(str(shipped()[name]))["get_config"]
    with pytest.raises(ValueError, match=rf"{name.rpartition('/')[2]} takes .*, not s5"):
        get_config("s5")


@pytest.mark.parametrize(
    "command, words",
    [
        (train.main, "required: --config, --workdir"),
        (evaluate.main, "expected one of --workdir and --pretrained"),
        (compare.main, "required: --workdir, --config, --mixers"),
        (sweep.main, "required"),
    ],
)
def test_arguments_of_every_command(command, words, capsys):
    with pytest.raises(SystemExit) as caught:
        command(["--help"])
    assert caught.value.code == 0
    assert "python -m experiments." in capsys.readouterr().out
    try:
        code = command([])
    except SystemExit as error:
        code = error.code
    assert code == EXIT_REFUSED
    assert words in capsys.readouterr().err


def test_training_refuses_unknown_fields_before_it_makes_a_folder(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        train.main([f"--config={S5}", f"--workdir={tmp_path / 'run'}", "--config.model.dtypo=float32"])
    assert caught.value.code == EXIT_REFUSED
    assert "did you mean 'dtype'?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_errors_of_the_user_are_reported_and_others_are_not(capsys):
    def failing(error):
        def main(argv=None):
            raise error

        return reporting(main)

    assert failing(ValueError("width=0"))() == EXIT_REFUSED
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "ValueError: width=0"
    assert re.fullmatch(r"\(from .*test_command_line\.py:\d+\)", said[1])
    assert failing(RuntimeError(f"{NO_BACKEND} 'cuda'"))() == EXIT_REFUSED
    assert failing(KeyboardInterrupt())() == 130
    with pytest.raises(RuntimeError):
        failing(RuntimeError("a fault of ours"))()
    with pytest.raises(AssertionError):
        failing(AssertionError())()


def test_a_platform_that_is_not_there_is_named(monkeypatch, capsys):
    def devices():
        raise RuntimeError(f"{NO_BACKEND} 'cuda'")

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(SystemExit) as caught:
        parsed(S5)
    assert caught.value.code == EXIT_REFUSED
    assert capsys.readouterr().err == f"JAX_PLATFORMS=cuda: {NO_BACKEND} 'cuda'\n"


@pytest.mark.slow
def test_a_reader_that_leaves_ends_the_command_quietly():
    command = [sys.executable, "-m", "experiments.list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
