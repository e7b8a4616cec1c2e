"""Settings of the tests of primitives."""

import pytest


@pytest.fixture(scope="package", autouse=True)
def _short_chunks():
    """Chunks short enough for every test length to cross their borders, and quick to compile."""
    from layers.kernels.selective_scan import xla as selective_scan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selective_scan, "BLOCK", {"cpu": 2})
        patch.setattr(selective_scan, "BLOCKS", 2)
        yield
