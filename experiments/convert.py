"""Writes a language model as a checkpoint in the format of transformers, and prints a table of its tensors.

    python -m experiments.convert runs/stories checkpoints/stories
    python -m experiments.convert checkpoints/Qwen3-0.6B checkpoints/halved --param_dtype=bfloat16
    python -m experiments.convert runs/poems checkpoints/poems --adapter_only

IN is the work directory of a run or a checkpoint in the format of transformers; OUT is a folder that holds none. The extra `pretrained`
has the package that this needs. The adapters of a run with train.lora are added to the matrices, or, with --adapter_only, written
alone in the format of peft. Which architectures there are is a table in the README; a model that none of them expresses is
refused. Exit codes: 0 done; 2 IN or OUT cannot be used.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.config.command_line import ArgumentError, Parser, folder, path, reporting
from experiments.runs.directory import RunDirectory
from experiments.training.trained import open_run
from seqmodels import LanguageModel, load_pretrained, merge_adapters, save_adapter, save_pretrained
from seqmodels.adapters import has_adapters
from seqmodels.interop.files import CONFIG, opened_tensors, read_json
from seqmodels.interop.lora import WEIGHTS


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Writes the checkpoint, prints its tensors and returns the exit code."""
    args = parser().parse_args(argv)
    try:
        model = read(args.source, args.checkpoint, args.param_dtype, args.adapter)
        if args.adapter_only and not has_adapters(model):
            raise ArgumentError(
                f"--adapter_only: IN={args.source} has no adapters; expected a run with train.lora"
            )
        if args.adapter_only:
            base = RunDirectory(args.source).config()["train"].get("pretrained")
            save_adapter(model, args.target, base=base, architecture=args.architecture)
        else:
            merge_adapters(model)
            save_pretrained(model, args.target, architecture=args.architecture)
    except (ValueError, ImportError) as error:
        raise ArgumentError(str(error)) from None
    print("\n".join(table(args.target, adapter=args.adapter_only)))
    return 0


def parser() -> Parser:
    """Returns the parser of the command."""
    made = Parser("experiments.convert", __doc__)
    made.add_argument(
        "source", metavar="IN", type=path, help="work directory of a run, or a folder with config.json"
    )
    made.add_argument("target", metavar="OUT", type=folder, help="folder of the checkpoint")
    made.add_argument(
        "--architecture", help="such as MistralForCausalLM; by default the first that expresses the model"
    )
    made.add_argument(
        "--adapter", type=path, help="folder of a low-rank adapter (peft's format), merged into a checkpoint"
    )
    made.add_argument(
        "--adapter_only",
        action="store_true",
        help="of a run with train.lora: write its adapters alone (peft's format)",
    )
    made.add_argument("--checkpoint", default="best", help="of a run: best (the default), last, or a step")
    made.add_argument(
        "--param_dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="type of the matrices of a checkpoint that is read (default: float32); a run has its own",
    )
    return made


def read(source: Path, checkpoint: str, param_dtype: str, adapter: Path | None) -> LanguageModel:
    """Returns the model of a checkpoint in the format of transformers, or of a run.

    Raises:
      ArgumentError: the folder holds neither.
      ValueError: what it holds cannot be used.
    """
    if not source.is_dir():
        raise ArgumentError(
            f"IN={source} is no folder; expected the work directory of a run, or a checkpoint"
        )
    if (source / CONFIG).is_file() and "model_type" in read_json(source / CONFIG):
        return load_pretrained(source, param_dtype=param_dtype, adapter=adapter)[0]
    if adapter is not None:
        raise ArgumentError(f"--adapter={adapter} needs a checkpoint with config.json; IN={source} is none")
    return open_run(str(source), checkpoint).model


def table(target: Path, *, adapter: bool = False) -> list[str]:
    """Returns the lines of a table: name, shape and number of parameters of each tensor, and their sums."""
    kind = "adapter" if adapter else read_json(target / CONFIG)["architectures"][0]
    with opened_tensors(target, WEIGHTS if adapter else None) as tensors:
        rows = [(name, str(list(tensors.shape(name))), tensors.size(name)) for name in sorted(tensors.names)]
    wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{name:{wide[0]}}  {shape:{wide[1]}}  {size:>12,}" for name, shape, size in rows]
    return [
        *lines,
        f"{kind}: {len(rows)} tensors, {sum(size for *_, size in rows):,} parameters in {target}",
    ]


if __name__ == "__main__":
    sys.exit(main())
