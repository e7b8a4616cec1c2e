"""Settings of the tests of primitives."""

import pytest


@pytest.fixture(scope="package", autouse=True)
def tpu_blocks():
    """Kernels for TPUs under an interpreter, with blocks short enough for the test lengths to need several.

    Gives what was set before: modules, names and values.
    """
    from layers.kernels import mosaic_tpu
    from layers.kernels.attention import tpu as attention
    from layers.kernels.delta_rule import tpu as delta_rule
    from layers.kernels.gated_linear_attention import tpu as gated_linear_attention
    from layers.kernels.linear_recurrence import tpu as linear_recurrence
    from layers.kernels.short_conv import tpu as short_conv

    short = [
        (mosaic_tpu, "LANES", 8),
        (linear_recurrence, "STEPS", 32),
        (linear_recurrence, "GROUP", 16),
        (gated_linear_attention, "CHUNK", 16),
        (gated_linear_attention, "CHUNKS", 4),
        (delta_rule, "CHUNK", 16),
        (delta_rule, "CHUNKS", 4),
        (short_conv, "STEPS", 32),
        (short_conv, "CHANNELS", 16),
        (short_conv, "GROUP", 16),
        (attention, "BLOCK", 128),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in short]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mosaic_tpu, "INTERPRET", True)
        for setting in short:
            patch.setattr(*setting)
        yield before


@pytest.fixture(scope="package", autouse=True)
def _short_chunks():
    """Chunks short enough for every test length to cross their borders, and quick to compile."""
    from layers.kernels.selective_scan import xla as selective_scan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selective_scan, "BLOCK", {"cpu": 2})
        patch.setattr(selective_scan, "BLOCKS", 2)
        yield
