"""Which implementation a call takes: the first that may, the one that is named, or the one that is preferred."""

import jax
import jax.numpy as jnp
import pytest
from jax import export

from layers.kernels import devices
from layers.kernels.dispatch import (
    Choice,
    Implementation,
    by_name_only,
    dispatch,
    explained,
    log_once,
    noted,
    preferred,
)

BY_NAME = by_name_only()
IMPLEMENTATIONS = {
    "even": Implementation(
        lambda x: ("even", x), unsupported_reason=lambda x: "it is odd" if x % 2 else None
    ),
    "small": Implementation(
        lambda x: ("small", x), passed_over_reason=lambda x: None if x < 10 else "it is large"
    ),
    "by name": Implementation(lambda x: ("by name", x), passed_over_reason=by_name_only),
    "reference": Implementation(lambda x: ("reference", x), passed_over_reason=by_name_only),
}


def taken(x, impl=None):
    return dispatch("parity", IMPLEMENTATIONS, impl, x=x)[0]


def test_the_first_that_may_and_can_is_taken():
    assert [taken(x) for x in (2, 3, 12, 13)] == ["even", "small", "even", "reference"]
    assert taken(2, "by name") == "by name"


def test_names_that_cannot_be_taken():
    with pytest.raises(ValueError, match="impl='even' of parity cannot take this call: it is odd"):
        taken(3, "even")
    with pytest.raises(ValueError, match="'evn' is not an implementation of parity.*did you mean 'even'"):
        taken(3, "evn")


def test_kernels_for_one_device_leave_symbolic_sizes_to_others():
    kernel = Implementation(
        lambda x: x + 1, unsupported_reason=lambda x: "" if x.size > 8 else None, backend="gpu"
    )
    choices = {
        "gpu": kernel,
        "xla": Implementation(lambda x: x - 1),
        "reference": Implementation(lambda x: x),
    }
    (size,) = export.symbolic_shape("n")
    shape = jax.ShapeDtypeStruct((size,), jnp.float32)
    program = export.export(jax.jit(lambda x: dispatch("shift", choices, None, x=x)))(shape)
    assert program.call(jnp.ones(3)).tolist() == [0, 0, 0]
    with pytest.raises(
        ValueError, match=r"x has shape \(n,\); its kernels need numbers: export with impl='xla'"
    ):
        export.export(jax.jit(lambda x: dispatch("shift", choices, "gpu", x=x)))(shape)


def test_what_is_preferred_is_taken_where_it_can_be_and_nothing_is_named():
    with preferred({"parity": "by name", "other": "even"}):
        assert taken(2) == "by name"
        assert taken(2, "small") == "small"
    with preferred({"parity": "even"}):
        assert [taken(12), taken(3)] == ["even", "small"]
    with preferred({"parity": "none"}), pytest.raises(ValueError, match="'none' is not an implementation"):
        taken(2)
    assert taken(3) == "small"


def test_calls_are_noted():
    with noted() as names:
        taken(2), taken(3), taken(3, "by name")
    taken(2)
    assert names == [("parity", "even"), ("parity", "small"), ("parity", "by name")]


def test_choices_are_explained():
    with explained() as choices:
        taken(2), taken(13), taken(3, "by name")
    assert choices == [
        Choice("parity", "", "even", ()),
        Choice(
            "parity", "", "reference", (("even", "it is odd"), ("small", "it is large"), ("by name", BY_NAME))
        ),
        Choice("parity", "", "by name", ()),
    ]


def test_only_what_the_device_could_run_is_logged_and_once(caplog):
    implementations = {
        "gpu": Implementation(lambda x: x, lambda x: "it is small", backend="gpu"),
        "tpu": Implementation(lambda x: x, lambda x: "it is no TPU", backend="tpu"),
        "xla": Implementation(lambda x: x),
    }
    log_once.cache_clear()
    with caplog.at_level("INFO", logger="layers"), devices.as_on("gpu"):
        with explained():
            dispatch("size", implementations, None, x=1)
        assert not caplog.records
        for _ in range(2):
            dispatch("size", implementations, None, x=1)
    assert [record.getMessage() for record in caplog.records] == ["size does not take 'gpu': it is small"]
