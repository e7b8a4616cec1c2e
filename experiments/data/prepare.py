"""Builds a data set ahead of the first run, and checks it: `python -m experiments.data.prepare listops --preset=full`."""

import argparse
import dataclasses
from collections.abc import Sequence

from experiments.data import cache, listops, listops_datasets


def _add_listops(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("listops", help="ListOps of Long Range Arena")
    parser.add_argument("--preset", choices=tuple(listops.PRESETS), help='default "full"')
    for field in dataclasses.fields(listops.ListOpsConfig):
        parser.add_argument(f"--{field.name}", type=int, help="instead of the preset's")
    parser.add_argument("--workers", type=int, help="processes that generate; default: one for each core")
    parser.add_argument("--official_dir", help="read Long Range Arena's TSV files in this folder instead")
    parser.set_defaults(prepare=_prepare_listops, refuse=parser.error)


def _prepare_listops(options: argparse.Namespace) -> cache.Dataset:
    names = [field.name for field in dataclasses.fields(listops.ListOpsConfig)]
    overrides = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.official_dir is None:
        try:
            config = listops.preset_config(options.preset or "full", **overrides)
        except ValueError as error:
            options.refuse(str(error))
        return listops_datasets.load_generated(config, data_dir=options.data_dir, workers=options.workers)
    generator_options = [name for name in ("preset", "workers") if getattr(options, name) is not None]
    if generator_options or overrides:
        refused = ", ".join(f"--{name}" for name in (*generator_options, *overrides))
        options.refuse(f"{refused}: no meaning together with --official_dir")
    return listops_datasets.load_official(options.official_dir, data_dir=options.data_dir)


def main(arguments: Sequence[str] | None = None) -> None:
    """Builds or loads the data set of the arguments, and prints a summary of its manifest."""
    parser = argparse.ArgumentParser(prog="python -m experiments.data.prepare", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="DATASET")
    _add_listops(commands)
    for command in commands.choices.values():
        command.add_argument("--data_dir", help="default: $SEQMODELS_DATA, else ~/.cache/seqmodels")
    options = parser.parse_args(arguments)
    try:
        print(cache.summary(options.prepare(options)))
    except (FileNotFoundError, cache.CorruptCacheError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
