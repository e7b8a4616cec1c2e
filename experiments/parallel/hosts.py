"""Several processes that train one run, each with its own devices."""

import numbers
import os
import sys
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

# A process without a heartbeat for this time is considered lost, and the others end.
HEARTBEAT_SECONDS = 30
LAUNCHERS = "SLURM, Kubernetes, Open MPI or a TPU pod"


def connect(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins this process to the others of the run. It must be called before anything uses JAX's devices.

    Without arguments, the settings of the cluster's launcher are used. Processes on CPUs exchange arrays through Gloo.

    Args:
      coordinator: address HOST:PORT of process 0.
      num_processes, process_id: number of processes of the run, and index of this one from 0.

    Raises:
      ValueError: if only some of the arguments are given, they are inconsistent, or no launcher provides settings.
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
    """Returns whether this process writes logs, plots and results: process 0."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Returns whether the flag is set in any process. All processes must call it at the same step."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(flag).any())


def from_main(number: int) -> int:
    """Returns the number that process 0 passes. All processes must call it at the same step."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def wait_for_all(name: str) -> None:
    """Returns when all processes have called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def leave(code: int) -> NoReturn:
    """Ends this process at once: JAX's shutdown at exit would wait for the other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def lost_process(error: Exception) -> str | None:
    """Returns a message if `error` comes from the loss of another process, or else None."""
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
