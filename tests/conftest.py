"""Settings that every test runs under; nothing here is imported by a test.

- `--share=K/N` takes the K-th of N shares of the slow tests; all others run as without it.
- Of a test with the mark `sample(n)`, every n-th case runs by default, the first one included; the others are slow.
- So are the cases that long.txt names: they took four seconds or more on one core, compilation included.

- JAX runs on the CPU with eight emulated devices, so that tests of sharding need no special process. `-m gpu` leaves
  the choice of device to JAX.
- XLA spends little on optimisation and keeps what it compiles in .jax_cache: compiling takes most of the tests' time.
- Compiled programs are dropped before there are too many for one process.
- Silent rank promotion, (d,) + (t, d), is an error.
- The annotations of `layers` and `seqmodels` are checked on every call by jaxtyping and beartype, where beartype is
  installed, except inside `pytest.raises`: such a block is about the library's own errors, which are what a user sees.
"""

import collections
import contextlib
import gc
import importlib.util
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import hypothesis
import jaxtyping
import pytest
from _pytest.mark.expression import Expression

from tests.shares import in_share, read_share

CHECKED_PACKAGES = ["layers", "seqmodels"]
CPU_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
MAPS = pathlib.Path("/proc/self/maps")
MOST_MAPS = 25_000
TESTS_BETWEEN_COUNTS = 50
_TESTS_DONE = pytest.StashKey[int]()
COMPILED = pathlib.Path(__file__).resolve().parents[1] / ".jax_cache"


def _wants_gpu(config: pytest.Config) -> bool:
    """Whether the `-m` expression selects a test that is marked `gpu` and nothing else."""
    expression = config.getoption("markexpr")
    return not expression or Expression.compile(expression).evaluate(lambda name, **_: name == "gpu")


def _prepare_jax(config: pytest.Config) -> None:
    if "jax" in sys.modules:
        raise pytest.UsageError("jax was imported before tests/conftest.py could choose its devices")
    os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    if _wants_gpu(config):
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "").split()
    given = {flag.partition("=")[0] for flag in flags}
    flags += [flag for flag in CPU_FLAGS if flag.partition("=")[0] not in given]
    os.environ["XLA_FLAGS"] = " ".join(flags)


def _prepare_hypothesis() -> None:
    # Compilation makes the first example of a shape slow, so time limits say nothing.
    common = {
        "deadline": None,
        "suppress_health_check": [hypothesis.HealthCheck.too_slow],
        "print_blob": True,
    }
    hypothesis.settings.register_profile("default", max_examples=6, **common)
    hypothesis.settings.register_profile("ci", max_examples=6, derandomize=True, database=None, **common)
    hypothesis.settings.register_profile("thorough", max_examples=200, **common)
    chosen = os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "default")
    hypothesis.settings.load_profile(chosen)


def _check_annotations() -> None:
    if importlib.util.find_spec("beartype") is None:
        return
    jaxtyping.install_import_hook(CHECKED_PACKAGES, "beartype.beartype")
    expect = pytest.raises

    @contextlib.contextmanager
    def raises(*args: Any, **kwargs: Any) -> Iterator[pytest.ExceptionInfo]:
        before = jaxtyping.config.jaxtyping_disable
        jaxtyping.config.update("jaxtyping_disable", True)
        try:
            with expect(*args, **kwargs) as info:
                yield info
        finally:
            jaxtyping.config.update("jaxtyping_disable", before)

    pytest.raises = raises


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", help="K/N: the K-th of N shares of the slow tests")


def pytest_configure(config: pytest.Config) -> None:
    _prepare_jax(config)
    _prepare_hypothesis()
    _check_annotations()


def pytest_report_header(config: pytest.Config) -> str:
    checked = "checked" if importlib.util.find_spec("beartype") else "not checked (beartype is not installed)"
    platforms = os.environ.get("JAX_PLATFORMS", "chosen by JAX")
    return f"platform: {platforms}; annotations: {checked}"


def _mark_what_is_long(items: list[pytest.Item]) -> None:
    named = set((pathlib.Path(__file__).parent / "long.txt").read_text(encoding="utf-8").splitlines())
    for item in items:
        if item.nodeid in named:
            item.add_marker(pytest.mark.slow)


def _mark_what_is_not_sampled(items: list[pytest.Item]) -> None:
    cases: collections.Counter[str] = collections.Counter()
    for item in items:
        sample = item.get_closest_marker("sample")
        if sample is None or item.get_closest_marker("slow"):
            continue
        test, _, _ = item.nodeid.partition("[")
        if cases[test] % sample.args[0]:
            item.add_marker(pytest.mark.slow)
        cases[test] += 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out other shares, and GPU tests whenever JAX is held on the CPU, whatever else `-m` or a path selects."""
    _mark_what_is_not_sampled(items)
    _mark_what_is_long(items)
    share = config.getoption("share")
    try:
        share = share and read_share(share)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error

    def left_out(item: pytest.Item) -> bool:
        if item.get_closest_marker("gpu"):
            return not _wants_gpu(config)
        return bool(share and item.get_closest_marker("slow") and not in_share(item.nodeid, share))

    chosen = [item for item in items if not left_out(item)]
    if len(chosen) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if left_out(item)])
        items[:] = chosen


@pytest.fixture(autouse=True)
def _needs_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu"):
        import jax

        if jax.default_backend() != "gpu":
            pytest.fail(f"a GPU test was asked for, but JAX sees only {jax.default_backend()}", pytrace=False)


@pytest.fixture(autouse=True)
def _room_for_compiled_programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Forgets compiled programs now and then: each maps memory several times, and Linux allows 65530 maps a process.

    XLA crashes when it gets no more. What is needed again comes from .jax_cache.
    """
    yield
    done = request.config.stash[_TESTS_DONE] = request.config.stash.get(_TESTS_DONE, 0) + 1
    if done % TESTS_BETWEEN_COUNTS or not MAPS.exists():
        return
    if MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()
