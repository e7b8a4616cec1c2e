"""The arrays of the published checkpoint that a config names."""

import os
from collections.abc import Mapping
from typing import Any

from experiments.parallel.mesh import Devices
from experiments.training.model import Arrays, arrays_of
from seqmodels.interop.loading import load_weights


def read_arrays(
    config: Mapping[str, Any], devices: Devices, adapter: str | os.PathLike | None = None
) -> tuple[Arrays, Arrays]:
    """Returns parameters and statistics of `train.pretrained` by their paths in the model of the config."""
    folder = config["train"]["pretrained"]
    return arrays_of(
        load_weights(folder, dict(config["model"]), adapter=adapter, mesh=devices.mesh, rules=devices.rules)
    )
