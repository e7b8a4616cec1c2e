"""The calls that the shared tests of primitives go through."""

import pytest

from layers.kernels.suites import SUITES

CASES = [(name, case) for name, suite in SUITES.items() for case in suite.cases]
CALLS = [
    (name, case, impl)
    for name, case in CASES
    for impl in SUITES[name].implementations + SUITES[name].tpu_implementations * case.tpu
]


def by_call(*, slow=lambda name, case, impl: impl == "tpu"):
    """Runs a test of (name, case, impl) for every call; those that are `slow` when asked for with `-m slow`."""
    return pytest.mark.parametrize(
        "name, case, impl",
        [
            pytest.param(
                *call, id=f"{call[0]}-{call[1].name}-{call[2]}", marks=[pytest.mark.slow] * slow(*call)
            )
            for call in CALLS
        ],
    )
