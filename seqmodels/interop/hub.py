"""Folders of checkpoints, and those that the package huggingface_hub fetches by identifier."""

import os
import re
from pathlib import Path

IDENTIFIER = re.compile(r"[\w.-]+/[\w.-]+")
FETCHED = (
    "config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "adapter_config.json",
)


def folder_of(name: str | os.PathLike, config: str = "config.json") -> Path:
    """Returns the folder that a path or an identifier such as "Qwen/Qwen3-0.6B" means; a folder of the name comes first.

    Raises:
      ValueError: there is neither a folder nor such an identifier, or the package is not installed or cannot fetch it.
    """
    try:
        folder = Path(name).expanduser()
    except RuntimeError:
        raise ValueError(f"folder={str(name)!r}; there is no such home directory") from None
    if folder.is_dir():
        return folder
    expected = f"expected one with {config} and safetensors"
    if not isinstance(name, str) or not IDENTIFIER.fullmatch(name) or folder.exists():
        raise ValueError(f"folder={str(name)!r} is no folder; {expected}")
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(
            f"folder={name!r} is no folder; {expected}. Identifiers of the Hugging Face hub need the package "
            "huggingface_hub: pip install 'jax-seqmodels[hub]'"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(FETCHED)))
    except Exception as error:  # noqa: BLE001  the package's own, those of its network library, and OSError
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"folder={name!r} is no folder, and the Hugging Face hub does not give it: {reason}; without a network, give "
            "the folder of a copy"
        ) from None
