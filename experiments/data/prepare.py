"""Builds a data set ahead of the first run, and checks it: `python -m experiments.data.prepare listops --preset=full`."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from experiments.config.command_line import ArgumentError, Parser, folder, reporting
from experiments.data import cache, listops, listops_datasets
from experiments.data.text.datasets import load_corpus
from experiments.data.text.sources import INVALID


def _add_listops(commands: argparse._SubParsersAction) -> None:
    # Not a `Parser`, which is that of a whole command.
    parser = commands.add_parser("listops", help="ListOps of Long Range Arena", allow_abbrev=False)
    parser.add_argument("--preset", choices=tuple(listops.PRESETS), help='default "full"')
    for field in dataclasses.fields(listops.ListOpsConfig):
        parser.add_argument(f"--{field.name}", type=int, help="instead of the preset's")
    parser.add_argument("--workers", type=int, help="processes that generate; default: one for each core")
    parser.add_argument("--official_dir", help="read Long Range Arena's TSV files in this folder instead")
    parser.set_defaults(prepare=_prepare_listops)


def _prepare_listops(options: argparse.Namespace) -> cache.Dataset:
    names = [field.name for field in dataclasses.fields(listops.ListOpsConfig)]
    overrides = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.official_dir is None:
        config = listops.preset_config(options.preset or "full", **overrides)
        return listops_datasets.load_generated(config, data_dir=options.data_dir, workers=options.workers)
    generator_options = [name for name in ("preset", "workers") if getattr(options, name) is not None]
    if generator_options or overrides:
        refused = ", ".join(f"--{name}" for name in (*generator_options, *overrides))
        raise ArgumentError(f"{refused}: no meaning together with --official_dir")
    return listops_datasets.load_official(options.official_dir, data_dir=options.data_dir)


def _add_text(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("text", help="documents of a corpus as tokens", allow_abbrev=False)
    parser.add_argument("--source", default="stdlib", help='a file, a folder or, by default, "stdlib"')
    parser.add_argument(
        "--tokenizer",
        default="bytes",
        help='"bytes" (the default), "characters", "bpe:VOCAB" or a tokenizer.json',
    )
    parser.add_argument("--invalid", choices=INVALID, default="error", help="bytes that are not UTF-8")
    parser.set_defaults(prepare=_prepare_text)


def _prepare_text(options: argparse.Namespace) -> cache.Dataset:
    return load_corpus(
        options.source, tokenizer=options.tokenizer, invalid=options.invalid, data_dir=options.data_dir
    ).dataset


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Builds or loads the data set of the arguments, prints a summary of its manifest, and returns the exit code."""
    parser = Parser("experiments.data.prepare", __doc__)
    commands = parser.add_subparsers(required=True, metavar="DATASET", parser_class=argparse.ArgumentParser)
    _add_listops(commands)
    _add_text(commands)
    for command in commands.choices.values():
        command.add_argument(
            "--data_dir", type=folder, help="default: $SEQMODELS_DATA, else ~/.cache/seqmodels"
        )
    options = parser.parse_args(argv)
    print(cache.summary(options.prepare(options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
