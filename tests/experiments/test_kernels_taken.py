"""Which mixers take kernels on Hopper GPUs with their default options and published sizes, and why the others do not."""

import pytest

from experiments import describe

MATRIX = "gated_linear_attention", "delta_rule", "linear_recurrence", "selective_scan"
QWEN3_NEXT = dict(heads=16, value_heads=32, key_dim=128, value_dim=128)
TAKEN = [
    *((width, name, {}) for width in (768, 2048) for name in ("retnet", "lightning_attention", "mamba2")),
    *((width, name, {}) for width in (768, 2048) for name in ("linear_attention", "performer")),
    (2048, "retnet", dict(heads=8)),  # heads of 256 x 512, as in the paper
    (768, "gated_deltanet", dict(heads=6)),  # heads of 96 x 192
    (2048, "gated_deltanet", dict(heads=12)),  # heads of 128 x 256
    (2048, "gated_deltanet", QWEN3_NEXT),
    (2048, "deltanet", dict(heads=16)),
    *((width, "hgrn", {}) for width in (768, 2048)),
    (768, "hgrn", dict(state="real")),
    *((width, name, {}) for width in (768, 2048) for name in ("gla", "hgrn2", "rwkv6")),
    (768, "mamba", {}),
]
# Key heads are width / 4 or 3/4 of it by default, and 256 as Gated DeltaNet was published.
LEFT = [
    (768, "deltanet", {}, "k has 192 features a head; expected at most 128"),
    (2048, "deltanet", {}, "k has 512 features a head; expected at most 128"),
    (768, "gated_deltanet", {}, "k has 144 features a head; expected at most 128"),
    (2048, "gated_deltanet", {}, "k has 384 features a head; expected at most 128"),
    (2048, "gated_deltanet", dict(heads=6, key_dim=256), "k has 256 features a head; expected at most 128"),
]


def calls(width, name, options):
    """The calls of a layer that carries a state, at 8 x 4096 tokens in bfloat16."""
    model = dict(kind="classifier", width=width, depth=1, pattern=(f"{name}+none",), mixers={name: options})
    config = dict(seed=0, task=dict(name="listops"), model=model | {"dtype": "bfloat16"})
    (row,) = describe.implementations(config, 4096, 8, "gpu")
    return [call for call in row["calls"] if call["primitive"] in MATRIX]


@pytest.mark.sample(3)
@pytest.mark.parametrize("width, name, options", TAKEN, ids=str)
def test_taken(width, name, options):
    (call,) = calls(width, name, options)
    assert call["implementation"] == "gpu", call["passed_over"]


@pytest.mark.parametrize("width, name, options, reason", LEFT, ids=str)
def test_left_to_xla(width, name, options, reason):
    (call,) = calls(width, name, options)
    assert call["implementation"] == "xla"
    assert reason in dict(call["passed_over"])["gpu"]
