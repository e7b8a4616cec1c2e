"""Options against their annotations: each kind of wrong value, for every config of layers and models."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Literal

import numpy as np
import pytest

from layers.channel import CHANNEL_MIXERS
from layers.mixers import MIXERS, make_mixer
from layers.norms import NORMS
from layers.options import Count, Fraction, Infinite, check_value, checked_dataclass
from layers.positions.position import POSITIONS
from seqmodels.config import ClassifierConfig, InputConfig, LanguageModelConfig, StackConfig, parse

REGISTERED = {config for registry in (MIXERS, CHANNEL_MIXERS, NORMS) for config, _ in registry.values()}
CONFIGS = sorted(
    REGISTERED | set(POSITIONS.values()) | {InputConfig, StackConfig, ClassifierConfig, LanguageModelConfig},
    key=lambda config: config.__name__,
)
MODEL = {"kind": "language_model", "width": 8, "depth": 1, "pattern": ("s5",), "vocab_size": 5}


def wrong_values(annotation):
    """Values that the annotation does not take, with the error that they raise."""
    members = typing.get_args(annotation) if typing.get_origin(annotation) is not Literal else (annotation,)
    members = members or (annotation,)
    wrong = []
    if typing.Any not in members:
        wrong += [object()]
        wrong += [] if type(None) in members else [None]
        wrong += [] if bool in members else [True]
        wrong += [] if float in members or int in members else [3]
        wrong += [0.5] if int in members else [float("nan"), float("inf")] if float in members else []
        if str not in members:
            wrong += ["no such"]
    return wrong


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_field_of_every_config_refuses_other_kinds(config):
    hints = typing.get_type_hints(config)
    needed = {
        field.name: 8
        for field in dataclasses.fields(config)
        if field.default is field.default_factory is dataclasses.MISSING
    }
    for name in (field.name for field in dataclasses.fields(config)):
        for value in wrong_values(hints[name]):
            if config.__name__ == "Mamba2Config" and name == "dt_limit":
                continue
            # Fields are checked in order, before they are compared with one another.
            before = {n: v for n, v in needed.items() if n != name}
            before |= {n: _some(hints[n]) for n in before}
            with pytest.raises((TypeError, ValueError), match=rf"^{name}=.*; expected"):
                config(**before, **{name: value})


def _some(hint):
    if hint is str:
        return "s5"
    if typing.get_origin(hint) is tuple:
        return ("s5",)
    if typing.get_origin(hint) is Mapping:
        return {"s5": {}, "attention": {}}
    if hint is InputConfig:
        return InputConfig(vocab_size=5)
    if hint is StackConfig:
        return StackConfig(width=8, depth=1, pattern=("s5",))
    return 8


def test_sizes_are_positive_in_every_config():
    for config in CONFIGS:
        for name, hint in typing.get_type_hints(config, include_extras=True).items():
            if hint is int or hint == (int | None):
                with pytest.raises(ValueError, match=rf"{name}=0; expected at least 1"):
                    check_value(name, 0, hint)


@pytest.mark.parametrize(
    "value, annotation",
    [
        (0, Count),
        (np.int64(3), int),
        (3, float),
        (np.float32(0.5), Fraction),
        (float("inf"), Infinite),
        (None, int | None),
        ([1, 2], tuple[int, ...]),
        ({"a": {"b": 3}}, Mapping[str, Mapping[str, float]]),
        (False, bool | Literal["projections"]),
    ],
)
def test_what_fits_passes(value, annotation):
    check_value("x", value, annotation)


@pytest.mark.parametrize(
    "value, annotation, error, message",
    [
        (-1, Count, ValueError, "x=-1; expected at least 0"),
        (1.0, Fraction, ValueError, "x=1.0; expected a number of at least 0 and below 1"),
        (1, bool | Literal["projections"], TypeError, "x=1; expected True or False or 'projections'"),
        ("jont", Literal["joint", "separate"], ValueError, "did you mean 'joint'"),
        ("ab", tuple[str, ...], TypeError, "x='ab'; expected a tuple of names"),
        ((1, True), tuple[int, int], TypeError, "each value an integer"),
        ((1,), tuple[int, int], ValueError, "expected a tuple of 2 integers"),
        ({"a": "b"}, Mapping[str, float], TypeError, "each entry a number"),
    ],
)
def test_what_does_not_fit_is_named(value, annotation, error, message):
    with pytest.raises(error) as raised:
        check_value("x", value, annotation)
    assert message in str(raised.value)


def test_fields_are_checked_before_they_are_compared():
    @checked_dataclass
    class Sizes:
        width: int
        heads: int = 2

        def __post_init__(self) -> None:
            if self.width % self.heads:
                raise ValueError("does not divide")

    @checked_dataclass
    class More(Sizes):
        depth: int = 1

    for kind in (Sizes, More):
        with pytest.raises(ValueError, match="heads=0"):
            kind(8, 0)
        with pytest.raises(ValueError, match="does not divide"):
            kind(8, 3)
    with pytest.raises(TypeError, match="depth='2'"):
        More(8, 2, "2")
    assert More(8, 2, 3) == More(8, 2, 3)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"scan": "no"}, "scan='no'; expected True or False"),
        ({"width": True}, "width=True; expected an integer"),
        ({"vocab_size": -3}, "vocab_size=-3; expected at least 1"),
        ({"dtype": "bf16"}, "dtype='bf16'; expected float32, bfloat16 or float16 .did you mean 'bfloat16'"),
        ({"mixer_defaults": {"haeds": 2}}, "'haeds'; did you mean 'heads'"),
        ({"mixer_defaults": {"width": 2}}, "'width', which the model supplies"),
        ({"mixers": {"s5": 3}}, "mixers={'s5': 3}; expected a dict"),
    ],
)
def test_fields_of_models(fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        parse(MODEL | fields)
    parse(MODEL | {"mixer_defaults": {"heads": 2, "causal": True}})


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("attention", {"causal": "no"}, "causal='no'"),
        ("s5", {"state_size": 0}, "state_size=0"),
        ("attention", {"head_dim": 0}, "head_dim=0"),
        ("attention", {"position": {"name": "rope", "base": "x"}}, "base='x'"),
        ("hgrn", {"dtype": "bf16"}, "did you mean 'bfloat16'"),
        ("bidirectional", {"inner": "s5", "tied": 1}, "tied=1"),
    ],
)
def test_options_of_mixers(name, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make_mixer(name, options, given={"width": 8}, rngs=None)
