"""Files of a published checkpoint: config.json, model.safetensors or shards with an index; read and written tensor by tensor."""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
# CPUs take memory that begins at a multiple of this many bytes as it is, without a copy.
ALIGNMENT = 64
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": jnp.dtype(jnp.bfloat16)}


def library() -> Any:
    """Returns the package safetensors.

    Raises:
      ImportError: it is not installed.
    """
    try:
        import safetensors.numpy
    except ImportError:
        raise ImportError(
            "checkpoints in the format of transformers need the package safetensors: pip install 'jax-seqmodels[pretrained]'"
        ) from None
    return safetensors


def read_json(file: Path) -> dict[str, Any]:
    """Returns the mapping in a JSON file.

    Raises:
      ValueError: there is no such file, or it is no mapping in JSON.
    """
    try:
        made = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    if not isinstance(made, dict):
        raise ValueError(f"{file} holds a {type(made).__name__}; expected a mapping of options")
    return made


def new_folder(folder: str | os.PathLike, names: Iterable[str]) -> Path:
    """Returns the path of a folder that is to be written.

    Raises:
      ValueError: it is a file, or holds one of the names.
    """
    path = Path(folder).expanduser()
    if path.exists() and not path.is_dir():
        raise ValueError(f"folder={str(path)!r} is a file; expected a folder")
    if held := [name for name in names if (path / name).exists()]:
        raise ValueError(f"folder={str(path)!r} holds {held[0]} already; expected another or an empty folder")
    return path


class Tensors:
    """The tensors of a checkpoint by name, of which only the headers are read until one is asked for.

    Raises:
      ValueError: there are no weights in safetensors' format, a shard is missing, or a file is truncated.
    """

    def __init__(self, shards: Iterable[Path], stack: contextlib.ExitStack):
        self._files, self._places = {}, {}
        for file in shards:
            opened = stack.enter_context(_opened(file))
            self._files |= dict.fromkeys(opened.keys(), opened)
            self._places |= _places(file)

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def size(self, name: str) -> int:
        """Returns the number of numbers in a tensor."""
        return math.prod(self.shape(name))

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor. Several threads may read at once."""
        if name not in self._places:
            return self._files[name].get_tensor(name)
        file, start, dtype = self._places[name]
        array = aligned(self.shape(name), dtype)
        waiting = memoryview(array.reshape(-1).view(np.uint8))
        # Unlike `get_tensor`, this lets other threads run.
        with file.open("rb", buffering=0) as opened:
            opened.seek(start)
            while waiting:
                waiting = waiting[opened.readinto(waiting) :]
        return array


class Parted:
    """Tensors of which some hold several, by the names of these; as `Tensors` otherwise.

    Raises:
      ValueError: a tensor has not the rows of all that it holds.
    """

    def __init__(self, tensors: Tensors, joined: Mapping[str, Mapping[str, int]], *, of: str):
        self._tensors = tensors
        self._rows: dict[str, tuple[str, slice]] = {}
        whole = set()
        for pattern, parts in joined.items():
            for name in filter(re.compile(pattern).search, sorted(tensors.names)):
                shape, count = tensors.shape(name), sum(parts.values())
                if shape[0] != count:
                    expected = (count, *shape[1:])
                    raise ValueError(f"{of} has {name} of shape {shape}; its config.json asks for {expected}")
                whole.add(name)
                start = 0
                for part, size in parts.items():
                    self._rows[re.sub(pattern, part, name)] = name, slice(start, start + size)
                    start += size
        self.names = (tensors.names - whole) | self._rows.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        if name not in self._rows:
            return self._tensors.shape(name)
        whole, rows = self._rows[name]
        return rows.stop - rows.start, *self._tensors.shape(whole)[1:]

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor."""
        if name not in self._rows:
            return self._tensors.read(name)
        whole, rows = self._rows[name]
        return self._tensors.read(whole)[rows]


def parted(tensors: Tensors, joined: Mapping[str, Mapping[str, int]], *, of: str) -> Tensors | Parted:
    """Returns the tensors, with the parts of those that hold several (see `Family.joined`) in their place."""
    return Parted(tensors, joined, of=of) if joined else tensors


@contextlib.contextmanager
def opened_tensors(folder: Path, name: str | None = None) -> Iterator[Tensors]:
    """Opens the weights of a checkpoint, or the file of a name in its folder; see `Tensors`."""
    with contextlib.ExitStack() as stack:
        yield Tensors(_shards(folder) if name is None else [folder / name], stack)


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.exists():
        if (folder / WHOLE).exists():
            return [folder / WHOLE]
        other = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        hint = (
            f"; {', '.join(other)} may hold code and is not read, convert it to safetensors" if other else ""
        )
        raise ValueError(f"{folder} has no {WHOLE} and no {INDEX}{hint}")
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files")
    names = sorted(set(listed.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index} names {outside[0]!r}; expected files of the same folder")
    if missing := [name for name in names if not (folder / name).exists()]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names")
    return [folder / name for name in names]


def _places(file: Path) -> dict[str, tuple[Path, int, np.dtype]]:
    """Returns file, first byte and type of the tensors of a whole file in safetensors' format."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    return {
        name: (file, 8 + size + entry["data_offsets"][0], DTYPES[entry["dtype"]])
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] in DTYPES
    }


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an array whose memory a CPU takes as it is."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _opened(file: Path) -> Any:
    package = library()
    try:
        return package.safe_open(file, framework="np")
    except package.SafetensorError as error:
        raise ValueError(f"{file} is truncated or no safetensors file: {error}") from None


def write_tensors(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], *, shard_size: int) -> None:
    """Writes tensors into one file, or into several of about `shard_size` bytes with an index."""
    package = library()
    written: list[tuple[Path, list[str]]] = []
    held: dict[str, np.ndarray] = {}
    total = size = 0

    def write() -> None:
        part = folder / f"part-{len(written)}.safetensors"
        # The package makes files that only their owner can read; those made here are as the umask says.
        part.touch()
        mode = part.stat().st_mode
        package.numpy.save_file(held, part, {"format": "pt"})
        part.chmod(mode)
        written.append((part, list(held)))
        held.clear()

    for name, array in tensors:
        if held and size + array.nbytes > shard_size:
            write()
            size = 0
        held[name] = np.ascontiguousarray(array)
        size, total = size + array.nbytes, total + array.nbytes
    write()
    if len(written) == 1:
        os.replace(written[0][0], folder / WHOLE)
        return
    places: dict[str, str] = {}
    for number, (part, names) in enumerate(written, start=1):
        final = f"model-{number:05}-of-{len(written):05}.safetensors"
        os.replace(part, folder / final)
        places |= dict.fromkeys(names, final)
    write_json(
        folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    )


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Writes a mapping as JSON."""
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
