"""Imports run downwards only: configs > experiments > seqmodels > layers > layers/kernels."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# From the bottom up. A file belongs to the first entry that its path starts with.
HOUSES = ["layers/kernels", "layers", "seqmodels", "experiments", "configs"]
OTHERS = {"tests", "tools", "notebooks"}

# What each house may import from outside; experiments may import anything.
ARRAYS = {"jax", "jaxtyping", "numpy"}
OUTSIDE = {
    "layers/kernels": ARRAYS,
    "layers": ARRAYS | {"flax"},
    "seqmodels": ARRAYS | {"flax", "huggingface_hub", "safetensors"},
    "configs": {"ml_collections"},
}
# The legend of array types imports nothing of ours, and every house reads it.
LEGEND = "layers.typing"


def house_of(path: str) -> str | None:
    return next((house for house in HOUSES if f"{path}/".startswith(f"{house}/")), None)


def imported_modules(source: str, package: tuple[str, ...]) -> set[str]:
    """Full names of everything that a file in `package` imports, wherever in the file it does so."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def violations(root: pathlib.Path) -> list[str]:
    """One line for every import under `root` that runs upwards or leaves what its house may use."""
    found = []
    for house in HOUSES:
        for file in sorted((root / house).rglob("*.py")):
            path = file.relative_to(root)
            if house_of(path.as_posix()) != house:
                continue
            for name in sorted(imported_modules(file.read_text(encoding="utf-8"), path.parent.parts)):
                if reason := refusal(house, name):
                    found.append(f"{path.as_posix()} imports {name}: {reason}")
    return found


def refusal(house: str, name: str) -> str | None:
    """Why a file of `house` may not import `name`, or None."""
    top = name.partition(".")[0]
    target = house_of(name.replace(".", "/"))
    if target == "configs" or top in OTHERS:
        return f"{top} is never imported"
    if target is not None:
        if house == "configs":
            return "configs are data; they import nothing of ours"
        if HOUSES.index(target) > HOUSES.index(house) and not f"{name}.".startswith(f"{LEGEND}."):
            return f"{target} lies above {house}"
        return None
    if top in sys.stdlib_module_names or house not in OUTSIDE or top in OUTSIDE[house]:
        return None
    return f"{house} may import only {', '.join(sorted(OUTSIDE[house]))} from outside"


def test_imports_run_downwards_only():
    assert violations(ROOT) == []


def test_every_folder_of_a_package_can_be_imported():
    folders = {
        file.parent for top in ("layers", "seqmodels", "experiments") for file in (ROOT / top).rglob("*.py")
    }
    assert [
        str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()
    ] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("layers/kernels/scan/xla.py", "from layers.mixers import s5"),
        ("layers/kernels/scan/xla.py", "from layers import norms"),
        ("layers/kernels/scan/xla.py", "from ... import norms"),
        ("layers/kernels/scan/xla.py", "import flax"),
        ("layers/norms.py", "import seqmodels.block"),
        ("layers/norms.py", "def f():\n    from experiments import train"),
        ("layers/norms.py", "import optax"),
        ("seqmodels/block.py", "from experiments.runs.checkpoints import save"),
        ("seqmodels/block.py", "import ml_collections"),
        ("experiments/train.py", "from configs.lra import listops"),
        ("experiments/train.py", "import tests.conftest"),
        ("configs/lra/listops.py", "import experiments"),
        ("configs/lra/listops.py", "from configs.lra import base"),
        ("configs/lra/listops.py", "import jax"),
    ],
)
def test_an_import_upwards_is_found(tmp_path, path, source):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert len(violations(tmp_path)) == 1
    assert violations(tmp_path)[0].startswith(path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "layers/kernels/scan/xla.py",
            "import functools\nimport jax.numpy as jnp\nfrom layers.typing import Array",
        ),
        (
            "layers/kernels/scan/xla.py",
            "from layers.kernels.checks import check_shape\nfrom . import reference",
        ),
        (
            "layers/mixers/state_space/s5.py",
            "from flax import nnx\nfrom layers.kernels.scan import scan\nfrom .. import norms",
        ),
        ("seqmodels/block.py", "import layers.norms\nfrom seqmodels import stack"),
        ("experiments/train.py", "import optax\nimport seqmodels\nfrom layers import registry"),
        ("configs/lra/listops.py", "import math\nfrom ml_collections import config_dict"),
    ],
)
def test_an_import_downwards_is_fine(tmp_path, path, source):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert violations(tmp_path) == []
