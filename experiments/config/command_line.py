"""Parts shared by the commands: arguments, the config with its overrides, exit codes, and errors without a traceback."""

import argparse
import csv
import functools
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.config.fields import FieldError, set_field
from experiments.config.files import find
from experiments.config.loading import to_plain
from experiments.config.pretrained import with_pretrained_model
from experiments.data.cache import CorruptCacheError
from layers.caches import CachePolicy, read_cache

EXIT_REFUSED = 2  # the command, the config or the work directory is invalid; nothing was computed
EXIT_DIVERGED = 65  # a loss or gradient norm is not finite; running again gives the same
EXIT_INTERRUPTED = 75  # interrupted after saving; the same command resumes
EXIT_KEYBOARD = 130  # Ctrl-C where there is nothing to save
EXIT_PIPE = 141  # nobody reads the output any more
EXIT_LOST = 69  # another process of the run ended; the same commands resume

# Errors that an invalid argument, config, folder or data cache raises.
REFUSALS = (ValueError, TypeError, OSError, CorruptCacheError)

# Several processes have to be connected before the first of them asks for devices.
SEVERAL_PROCESSES = ("--distributed", "--coordinator", "--num_processes", "--process_id")

# What JAX says where JAX_PLATFORMS names a device that is not there.
NO_BACKEND = "Unable to initialize backend"

OVERRIDE = re.compile(r"--?(no)?config\.([^=]*)(?:=(.*))?", re.DOTALL)
Overrides = list[tuple[str, str]]


SOURCES = str(Path(__file__).parents[2]) + os.sep


class ArgumentError(ValueError):
    """An invalid argument of the command; the message needs no place in the sources."""


class ConfigFileError(ArgumentError):
    """A config file that cannot be run; the message ends with its line."""


def refuse(error: Exception) -> int:
    """Prints the error and, unless an argument is invalid, the line of the sources that raised it; returns the exit code."""
    if isinstance(error, ArgumentError | FieldError):
        print(error, file=sys.stderr)
    else:
        frames = traceback.extract_tb(error.__traceback__)
        where = ([frame for frame in frames if frame.filename.startswith(SOURCES)] or frames)[-1]
        print(f"{type(error).__name__}: {error}\n(from {where.filename}:{where.lineno})", file=sys.stderr)
    return EXIT_REFUSED


def reporting(main: Callable[..., int]) -> Callable[..., int]:
    """Returns `main` with the errors of invalid input reported by `refuse`, and no more output once its reader has gone.

    For commands that compute nothing that takes long: an error of REFUSALS anywhere is taken for a user's.
    """

    @functools.wraps(main)
    def reported(argv: Sequence[str] | None = None) -> int:
        try:
            code = main(argv)
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            return EXIT_KEYBOARD
        except BrokenPipeError:  # such as `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_PIPE
        except REFUSALS as error:
            return refuse(error)
        except RuntimeError as error:
            if NO_BACKEND not in str(error):
                raise
            return refuse(error)

    return reported


class Parser(argparse.ArgumentParser):
    """The parser of a command; `parse_args` ends the process with exit code 2 and a message if arguments are invalid.

    With `config`, the command takes --config and an override per field: `--config.model.width=64`,
    `--config.model.scan`, `--noconfig.model.scan`. `args.config` is then the plain config with its overrides.
    """

    def __init__(self, command: str, doc: str, *, config: bool = False, workdir: bool = False):
        """Creates the parser from the name of the command and the docstring of its module, the text of --help."""
        super().__init__(
            prog=f"python -m {command}",
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._takes_config = config
        if config:
            self.add_argument(
                "--config",
                required=True,
                metavar="FILE[:KEY=VALUE,...]",
                help="the config, a file or a name that `list configs` shows, and the arguments of its get_config; "
                "--config.SECTION.FIELD=VALUE sets a field",
            )
        if workdir:
            self.add_argument("--workdir", required=True, type=path, help="directory of the run")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        """Returns the arguments with the loaded config."""
        given = list(sys.argv[1:] if args is None else args)
        if not self._takes_config:
            return super().parse_args(given, namespace)
        rest, overrides = split_overrides(given)
        found = super().parse_args(rest, namespace)
        if not any(argument.startswith(SEVERAL_PROCESSES) for argument in rest):
            self._check_platform()
        try:
            found.config = load(found.config, overrides)
        except REFUSALS as error:
            sys.exit(refuse(error))
        return found

    def _check_platform(self) -> None:
        """Ends the process unless JAX finds the devices that JAX_PLATFORMS names."""
        if platforms := os.environ.get("JAX_PLATFORMS"):
            try:
                jax.devices()
            except RuntimeError as error:
                sys.exit(refuse(ArgumentError(f"JAX_PLATFORMS={platforms}: {error}")))


def names(text: str) -> tuple[str, ...]:
    """Returns the names in a line of comma-separated values; quotes enclose a name with commas. A type of arguments."""
    found = tuple(name for line in csv.reader([text], skipinitialspace=True) for name in line)
    if not found or not all(map(str.strip, found)):
        raise argparse.ArgumentTypeError(f"{text!r}; a name is empty")
    return found


def positive_integer(text: str) -> int:
    """Returns the integer in the text, at least 1. A type of arguments."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected an integer of at least 1")
    return value


def positive_integers(text: str) -> tuple[int, ...]:
    """Returns the integers, at least 1, in a line of comma-separated values, at least one. A type of arguments."""
    return tuple(positive_integer(item) for item in text.split(","))


def positive_number(text: str) -> float:
    """Returns the finite number in the text, above 0. A type of arguments."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number above 0")
    return value


def cache_policy(text: str) -> CachePolicy:
    """Returns the policy of caches in the text, such as "snapkv(budget=1024)". A type of arguments."""
    try:
        return read_cache(text)
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path(text: str) -> Path:
    """Returns the path, which is not empty. A type of arguments."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} names no file or folder")
    return Path(text)


def folder(text: str) -> Path:
    """Returns the path of a folder that exists or can be made. A type of arguments."""
    try:
        expanded = path(text).expanduser()
    except RuntimeError:  # there is no such user
        raise argparse.ArgumentTypeError(f"{text!r}; there is no such home directory") from None
    absolute = expanded.absolute()
    existing = next(place for place in (absolute, *absolute.parents) if place.exists())
    if not existing.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}; {existing} is a file")
    return expanded


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], Overrides]:
    """Returns the arguments without overrides of the config, and the overrides in order as pairs of path and text."""
    rest: list[str] = []
    overrides: Overrides = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        found = OVERRIDE.fullmatch(argument)
        if not found:
            rest.append(argument)
            continue
        negated, path, text = found.groups()
        if text is None:
            # The value is the next argument; without one, a switch is set on or off.
            follows = not negated and bool(waiting) and not waiting[0].startswith("--")
            text = waiting.pop(0) if follows else "false" if negated else "true"
        overrides.append((path, text))
    return rest, overrides


def load(config: str, overrides: Overrides = ()) -> dict[str, Any]:
    """Returns the plain config that FILE:KEY=VALUE,... and overrides describe.

    Raises:
      ArgumentError: there is no such file, an argument is not KEY=VALUE, or the file raises (`ConfigFileError`).
      FieldError: an override names no field, or its text is no value of the field.
      ValueError, TypeError: the config is invalid.
    """
    path, colon, arguments = config.partition(":")
    for argument in filter(None, arguments.split(",")):
        key, equals, value = argument.partition("=")
        if not (key and equals and value):
            raise ArgumentError(
                f"--config={config}: the argument {argument!r} is not KEY=VALUE, such as mixer={value or key}"
            )
    try:
        file = find(path)
    except FileNotFoundError as error:
        raise ArgumentError(f"--config={config}: {error}") from None
    get_config, made = _run(file, [arguments] if colon else [])
    if not callable(get_config):
        raise ArgumentError(f"--config={config}: the file defines no get_config")
    if not isinstance(made, Mapping):
        raise ArgumentError(
            f"--config={config}: get_config returns {made!r}; expected a ConfigDict or a dict of sections"
        )
    plain = to_plain(made)
    for field, text in overrides:
        set_field(plain, field, text)
    return with_pretrained_model(to_plain(plain))


def _run(file: Path, arguments: Sequence[str]) -> tuple[Any, Any]:
    """Returns `get_config` of a config file, None if there is none, and what it returns as nested dicts.

    Raises:
      ConfigFileError: the file cannot be run or its `get_config` raises; names the line of the file.
    """
    try:
        get_config = runpy.run_path(str(file)).get("get_config")
        made = get_config(*arguments) if callable(get_config) else None
        return get_config, made.to_dict() if hasattr(made, "to_dict") else made
    except Exception as error:  # noqa: BLE001  whatever the file of a user raises
        raise ConfigFileError(_with_line(error, file)) from None


def _with_line(error: Exception, file: Path) -> str:
    """Returns the error in one line, and in a second one the last line of the file that took part."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)
    ]
    message = str(error)
    if isinstance(error, SyntaxError):
        lines, message = [error.lineno], error.msg
    where = f"{file}:{lines[-1]}" if lines and lines[-1] else str(file)
    return f"{type(error).__name__}: {' '.join(message.split())}".rstrip(": ") + f"\n(from {where})"
