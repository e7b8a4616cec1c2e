"""Several processes that train one run, each with devices of its own."""

import numbers
import os
import sys
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

# A process that has not been heard of for so long is taken for lost, and the others end.
HEARTBEAT_SECONDS = 30
LAUNCHERS = "SLURM, Kubernetes, Open MPI or a TPU pod"


def connect(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins this process to the others of the run. Call it before anything uses JAX's devices.

    Without arguments, what a cluster's launcher says is taken. Processes on CPUs exchange arrays through Gloo.

    Args:
      coordinator: HOST:PORT at which process 0 can be reached.
      num_processes, process_id: of the run, and this one's number from 0.

    Raises:
      ValueError: if some of the arguments are given and others not, or they do not fit, or no launcher says anything.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(
            f"{' and '.join(missing)} is missing; give --coordinator, --num_processes and --process_id together"
        )
    if not missing:
        if not isinstance(num_processes, numbers.Integral) or num_processes < 1:
            raise ValueError(f"num_processes={num_processes}; expected at least 1")
        if not 0 <= process_id < num_processes:
            raise ValueError(f"process_id={process_id}; expected 0 to {num_processes - 1}")
        if ":" not in coordinator:
            raise ValueError(f"coordinator={coordinator!r}; expected HOST:PORT")
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        raise ValueError(
            f"--distributed: no launcher ({LAUNCHERS}) was found: {error}; give --coordinator=HOST:PORT"
        ) from None


def is_main() -> bool:
    """Whether this process writes logs, plots and results: process 0."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process. All processes call it at the same step."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(flag).any())


def wait_for_all(name: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def leave(code: int) -> NoReturn:
    """Ends this process at once: without the others, what JAX does at exit would wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def lost_process(error: Exception) -> str | None:
    """What to say if `error` comes from the loss of another process; None if it does not."""
    if jax.process_count() == 1:
        return None
    text = str(error)
    signs = (  # of Gloo, NCCL and the coordination service
        "Gloo",
        "gloo",
        "Connection closed",
        "Connection reset",
        "heartbeat",
        "UNAVAILABLE",
        "NCCL",
        "Socket closed",
        "DEADLINE",
    )
    return (
        f"another process of this run ended ({text.splitlines()[0][:200]})"
        if any(s in text for s in signs)
        else None
    )
