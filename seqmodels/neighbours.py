"""Raises ImportError on import where another module called `layers` hides the package that this one is built on."""

import importlib.util
import sys
from pathlib import Path

NEEDED = "layers"


def place_of(name: str) -> Path | None:
    """Returns the file or folder that `import name` takes: that of a package, not of its __init__.py. None if nothing."""
    if (loaded := sys.modules.get(name)) is not None:
        file, folders = getattr(loaded, "__file__", None), getattr(loaded, "__path__", ())
    elif (spec := importlib.util.find_spec(name)) is not None:
        file, folders = spec.origin, spec.submodule_search_locations or ()
    else:
        return None
    found = next(iter(folders), file)
    return None if found is None else Path(found).resolve()


def check(root: Path) -> None:
    """Raises ImportError unless the package NEEDED is the one in the folder `root`; names what is found instead."""
    found, expected = place_of(NEEDED), root / NEEDED
    if found == expected:
        return
    if found is None or not expected.is_dir():
        raise ImportError(f"seqmodels needs the package `{NEEDED}` in {root}; install jax-seqmodels again")
    raise ImportError(
        f"{found} hides the package `{NEEDED}` of seqmodels, which is {expected}: rename it, or start Python in another "
        "directory"
    )


check(Path(__file__).resolve().parents[1])
