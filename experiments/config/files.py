"""The config files that come with the package, and how --config finds one."""

import difflib
from pathlib import Path

# In an installed package configs/ stands inside experiments/ (see setup.py), in the sources beside it. Inside comes first:
# beside an installed package may stand the configs of another project.
PLACES = (Path(__file__).absolute().parents[1], Path(__file__).absolute().parents[2])
NAME = "configs"


def root() -> Path:
    """Returns the folder that holds the folder `configs` of the package.

    Raises:
      FileNotFoundError: the folder is missing.
    """
    for place in PLACES:
        if (place / NAME).is_dir():
            return place
    raise FileNotFoundError(
        f"the configs of the package are missing: neither of {PLACES[0]} and {PLACES[1]} has {NAME}"
    )


def shipped() -> dict[str, Path]:
    """Returns the config files of the package by their names, such as "configs/lra/listops.py".

    A file whose name begins with "_" is no config: configs beside it load it by its path.
    """
    place = root()
    return {
        file.relative_to(place).as_posix(): file
        for file in sorted((place / NAME).rglob("*.py"))
        if not file.name.startswith("_")
    }


def find(path: str) -> Path:
    """Returns the config file that `path` means.

    Args:
      path: a file; or a file of the package by its name, of which the folders in front, "configs" first, and ".py" may be
        left out where one file is meant: "configs/lra/listops.py", "lra/listops" and "listops".

    Raises:
      FileNotFoundError: there is no such file; names the nearest of the package.
    """
    if Path(path).is_file():
        return Path(path)
    if not path.strip():
        raise FileNotFoundError("it names no file")
    files = shipped()
    ending = "/" + path.removesuffix(".py") + ".py"
    meant = [file for name, file in files.items() if f"/{name}".endswith(ending)]
    if len(meant) == 1:
        return meant[0]
    short = {file.stem: name for name, file in files.items()}
    near = difflib.get_close_matches(path, files, n=1)
    near += [short[stem] for stem in difflib.get_close_matches(Path(path).stem, short, n=1)]
    hint = f"; did you mean {near[0]!r}?" if near else "; `seqmodels list configs` shows those of the package"
    raise FileNotFoundError(
        f"{path} is a folder{hint}" if Path(path).is_dir() else f"there is no file {path}{hint}"
    )
