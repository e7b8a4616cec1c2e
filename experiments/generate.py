"""Continues prompts with the language model of a run, from its work directory alone, and prints the text as it comes.

    python -m experiments.generate --workdir=runs/stories --prompt="Once upon a time" --temperature=0.8 --top_p=0.95
    python -m experiments.generate --workdir=runs/stories --prompt=One --prompt=Two --temperature=0
    python -m experiments.generate --workdir=runs/code --prompt="def f(" --lookup=8
    python -m experiments.generate --workdir=runs/lm-350m --prompt="Once" --draft=runs/lm-10m --draft_cache="streaming(budget=512)"
    python -m experiments.generate --pretrained=checkpoints/Qwen3-0.6B --prompt="Once upon a time"
    python -m experiments.generate --pretrained=checkpoints/Qwen3-0.6B --adapter=checkpoints/poems --prompt="Once upon a time"
    python -m experiments.generate --workdir=runs/code --prompt="$(cat long.py)" --cache="snapkv(budget=1024)"

Each prompt is printed with its continuation, one after another. A continuation ends at the token that ends a document, before a
text of --stop, or after --max_new_tokens. Equal commands print equal texts; prompt number n samples with the seed plus n. With
--lookup, one call of the model checks several tokens that followed the last tokens earlier: the text is the same, and how many
tokens a call gave is printed on standard error. With --draft, the tokens that are checked are those of a smaller model, of a
run with the same tokenizer: at temperature 0 the text is the same, otherwise it has the same distribution. The run must be one
of a language model on a task that has a tokenizer. Exit codes: 0 done; 2 the run or an argument cannot be used; 65 a logit is
not finite.

--pretrained takes a published checkpoint in place of a run: a folder with config.json, safetensors and tokenizer.json (see
`seqmodels.load_pretrained`). --adapter adds a low-rank adapter in the format of peft to its matrices. A run that trained adapters
has them, and finds the checkpoint that they belong to.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config.command_line import (
    EXIT_DIVERGED,
    ArgumentError,
    Parser,
    cache_policy,
    path,
    positive_integer,
    reporting,
)
from experiments.data.text.tokenizers import Tokenizer, make_tokenizer
from experiments.training.trained import open_run
from seqmodels import Generation, LanguageModel, load_pretrained, stream

# Arguments that `stream` takes as they are.
OPTIONS = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "lookup",
    "ngram",
    "draft_tokens",
    "draft_cache",
    "cache",
)
# Tokens between two looks at the text; each prints what came since.
BLOCK = 8
# What `decode` puts in place of bytes that are not UTF-8, such as the first ones of a character.
REPLACED = "\ufffd"


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the prompts with their continuations and returns the exit code."""
    args = parser().parse_args(argv)
    for name in ("prompt", "stop"):
        if "" in getattr(args, name):
            raise ArgumentError(f"--{name}= is empty; expected a text")
    model, tokenizer = opened(args.workdir, args.pretrained, args.checkpoint, args.adapter)
    prompts = [encode(tokenizer, prompt) for prompt in args.prompt]
    options = {name: getattr(args, name) for name in OPTIONS} | {"stop": [[tokenizer.end]], "block": BLOCK}
    if args.draft is not None:
        options["draft"] = drafting(args.draft, tokenizer)
    try:
        streams = [
            stream(model, [prompt], seed=args.seed + number, **options)
            for number, prompt in enumerate(prompts)
        ]
    except (ValueError, TypeError) as error:
        raise ArgumentError(str(error)) from None
    made = Made()
    try:
        for prompt, blocks in zip(args.prompt, streams, strict=True):
            show(prompt)
            for piece in texts(made.counted(blocks), tokenizer, args.stop):
                show(piece)
            show("\n")
    except FloatingPointError as error:
        print(f"\n{error}", file=sys.stderr)
        return EXIT_DIVERGED
    if args.lookup is not None or args.draft is not None:
        print(made, file=sys.stderr)
    return 0


def opened(
    workdir: Path | None, pretrained: Path | None, checkpoint: str, adapter: Path | None = None
) -> tuple[LanguageModel, Tokenizer]:
    """Returns the model and the tokenizer of a run or of a published checkpoint.

    Raises:
      ArgumentError: neither or both are given, or the checkpoint cannot be used.
    """
    if (workdir is None) == (pretrained is None):
        raise ArgumentError("expected one of --workdir and --pretrained")
    if adapter is not None and pretrained is None:
        raise ArgumentError(f"--adapter={adapter} needs --pretrained, the checkpoint that it belongs to")
    if workdir is not None:
        trained = open_run(workdir, checkpoint)
        return trained.model, trained.plan.task.tokenizer
    try:
        model, _ = load_pretrained(pretrained, adapter=adapter, scan=False)
        if not isinstance(model, LanguageModel):
            raise ValueError("it is of a masked language model; expected one that continues a text")
        tokenizer = make_tokenizer(pretrained / "tokenizer.json", texts=list)
    except (ValueError, ImportError) as error:
        raise ArgumentError(f"--pretrained={pretrained}: {error}") from None
    return model, tokenizer


def drafting(workdir: Path, tokenizer: Tokenizer) -> LanguageModel:
    """Returns the model of a run that drafts for another.

    Raises:
      ArgumentError: its tokenizer is another than that of the model that generates.
    """
    trained = open_run(workdir, "best", option="--draft")
    own, wanted = trained.plan.task.tokenizer.manifest, tokenizer.manifest
    if own != wanted:
        raise ArgumentError(
            f"--draft={workdir} reads other tokens: its tokenizer is {own}; expected {wanted}, that of the model"
        )
    return trained.model


class Made:
    """Numbers of new tokens and of calls of the model that gave them."""

    def __init__(self):
        self.tokens = self.calls = 0

    def counted(self, blocks: Iterator[Generation]) -> Iterator[Generation]:
        """Yields the blocks, and counts them."""
        for block in blocks:
            self.tokens += int(block.lengths.sum())
            self.calls += block.calls
            yield block

    def __str__(self) -> str:
        return f"{self.tokens} tokens in {self.calls} calls of the model, {self.tokens / self.calls:.2f} per call"


def parser() -> Parser:
    """Returns the parser of the command."""
    made = Parser("experiments.generate", __doc__)
    made.add_argument("--workdir", type=path, help="directory of the run")
    made.add_argument(
        "--pretrained", type=path, help="folder of a published checkpoint, in place of --workdir"
    )
    made.add_argument(
        "--adapter", type=path, help="with --pretrained: folder of a low-rank adapter (peft's format)"
    )
    made.add_argument(
        "--prompt", action="append", required=True, help="text to continue; may be given several times"
    )
    made.add_argument(
        "--checkpoint", default="best", help="best (of validation; the default), last, or a step"
    )
    made.add_argument(
        "--max_new_tokens",
        type=positive_integer,
        default=256,
        help="the most new tokens per prompt (default: 256)",
    )
    made.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="divisor of the logits (default: 1); 0 takes the likeliest token",
    )
    made.add_argument("--top_k", type=int, help="sample from so many of the likeliest tokens")
    made.add_argument(
        "--top_p", type=float, help="sample from the fewest likely tokens whose probabilities sum to this"
    )
    made.add_argument(
        "--min_p", type=float, help="sample from tokens at least this fraction as likely as the likeliest"
    )
    made.add_argument(
        "--repetition_penalty",
        type=float,
        default=1.0,
        help="above 1, tokens that occurred are less likely (default: 1)",
    )
    made.add_argument(
        "--stop",
        action="append",
        default=[],
        help="text that ends a continuation and is not printed; may be repeated",
    )
    made.add_argument(
        "--lookup",
        type=positive_integer,
        help="check up to so many tokens per call of the model, which followed the last tokens earlier",
    )
    made.add_argument(
        "--ngram", type=positive_integer, help="number of last tokens that --lookup looks for (default: 3)"
    )
    made.add_argument(
        "--draft",
        type=path,
        metavar="WORKDIR",
        help="run of a smaller model, whose tokens a call of the model checks",
    )
    made.add_argument(
        "--draft_tokens",
        type=positive_integer,
        help="the most tokens of the draft model per call (default: 4)",
    )
    made.add_argument(
        "--draft_cache",
        type=cache_policy,
        metavar="NAME(KEY=VALUE,...)",
        help="policy of the caches of the draft model, such as streaming(budget=512)",
    )
    made.add_argument(
        "--cache",
        type=cache_policy,
        metavar="NAME(KEY=VALUE,...)",
        help="policy of the caches of attention, such as snapkv(budget=1024); `list caches` shows them",
    )
    made.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    return made


def encode(tokenizer: Any, prompt: str) -> np.ndarray:
    """Returns the token ids of a prompt.

    Raises:
      ArgumentError: the tokenizer cannot encode it.
    """
    try:
        ids = np.asarray(tokenizer.encode(prompt))
    except (ValueError, KeyError) as error:
        raise ArgumentError(f"--prompt={prompt!r} cannot be encoded: {error}") from None
    if not ids.size:
        raise ArgumentError(f"--prompt={prompt!r} has no tokens; expected a text that has at least one")
    return ids


def texts(blocks: Iterator[Generation], tokenizer: Any, stops: Sequence[str]) -> Iterator[str]:
    """Yields the text of the new tokens, as far as later tokens cannot change or remove it.

    Args:
      blocks: what `stream` returns for one prompt.
      tokenizer: has `end` and `decode`.
      stops: texts before the first of which the text ends.
    """
    ids: list[int] = []
    text, shown = "", 0
    for block in blocks:
        ids += block.tokens[0, : block.lengths[0]].tolist()
        text = tokenizer.decode(np.asarray([one for one in ids if one != tokenizer.end], np.int32))
        places = [place for stop in stops if (place := text.find(stop)) >= 0]
        if places:
            yield text[shown : min(places)]
            return
        if (sure := settled(text, stops)) > shown:
            yield text[shown:sure]
            shown = sure
    yield text[shown:]


def settled(text: str, stops: Sequence[str]) -> int:
    """Returns the length of the text without an end that may be part of a character or the beginning of a stop."""
    sure = len(text.rstrip(REPLACED))
    begun = [
        length for stop in stops for length in range(1, len(stop)) if text[:sure].endswith(stop[:length])
    ]
    return sure - max(begun, default=0)


def show(text: str) -> None:
    """Prints a piece of text at once; characters that the terminal does not have become question marks."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
