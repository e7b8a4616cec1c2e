"""The calls that the shared tests of primitives go through."""

from layers.kernels.suites import SUITES

CASES = [(name, case) for name, suite in SUITES.items() for case in suite.cases]
CALLS = [
    (name, case, impl)
    for name, case in CASES
    for impl in SUITES[name].implementations + SUITES[name].tpu_implementations * case.tpu
]
CALL_IDS = [f"{name}-{case.name}-{impl}" for name, case, impl in CALLS]
