"""The model of a config that starts from a published checkpoint."""

from collections.abc import Mapping
from typing import Any

from experiments.config.loading import to_plain
from seqmodels.interop.loading import load_config

# Fields of the section `model` that change how a model is trained, stored and run, and not what it is.
OF_TRAINING = ("dropout", "remat", "scan", "dtype", "param_dtype")


def with_pretrained_model(config: Mapping[str, Any], *, replace: bool = False) -> dict[str, Any]:
    """Returns the plain config with the model of `train.pretrained`, and unchanged if that is None.

    Args:
      replace: whether other models of the section are replaced; refused otherwise.

    Raises:
      ValueError: the checkpoint cannot be used, or the section `model` has another value of one of its fields.
    """
    folder = config["train"].get("pretrained")
    if folder is None:
        return dict(config)
    try:
        model = to_plain({**config, "model": load_config(folder)})["model"]
    except (ValueError, ImportError) as error:
        raise ValueError(f"config.train.pretrained={folder!r}: {error}") from None
    given = config["model"]
    for name, value in {} if replace else given.items():
        if name not in OF_TRAINING and value != model.get(name):
            has = f"{name}={model[name]!r}" if name in model else f"no {name}"
            raise ValueError(
                f"config.model.{name}={value!r}, but the checkpoint config.train.pretrained={folder!r} has {has}; leave it out"
            )
    kept = {name: given[name] for name in OF_TRAINING if name in given}
    return {**config, "model": model | kept}
