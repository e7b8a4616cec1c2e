"""Language models of 10M to 1.3B parameters, of one mixer or of a hybrid, all trained by one recipe.

    python -m experiments.train --config=configs/lm/models.py:size=10m,mixer=mamba2 --workdir=runs/lm-mamba2-10m
    python -m experiments.train --config=configs/lm/models.py:size=40m,mixer=mamba2,source=enwik8,length=2048 \
        --config.task.official_dir=enwik8.zip --workdir=runs/enwik8-mamba2-40m

Results: experiments/results/lm_rfc_h200 has a Transformer, Gated DeltaNet and their hybrid of `125m`, learning rates of five models, and
speeds. Test, bits per byte: 0.762, 0.696 and 0.707.

    size   width  layers   sizes include tied embeddings of 32,768 tokens; with `tokenizer=bytes` they are less
    10m      192       8
    40m      384      16
    125m     768      12
    350m    1024      24
    1.3b    2048      24

Models are pre-norm with RMSNorm and SwiGLU. A block has 12 d^2 parameters of Transformers. Mamba, its successors and
mLSTM have no channel mixer, so they have twice the layers, as published. Heads have 64 features up to `125m`, 128 above; those of delta rules
have 128 from `125m` on. Hybrids have the orders, ratios and positions of their papers, and experts have the hidden size of
the width, so that these models have more parameters than their size says, but about as many per token. The first layer of
`kimi_linear` has experts too.

Initial matrices have a standard deviation of 1 / sqrt(inputs), embeddings of 1 / sqrt(width), and what the papers of
the mixers state for the rest. `python -m experiments.describe --scale` shows what follows from it.

A published checkpoint (see `seqmodels.load_pretrained`) is trained further with `pretrained=FOLDER` in place of `mixer=`; its
tokenizer.json is the tokenizer, and `size` then says only the learning rate, the rows and what is recomputed:

    python -m experiments.train --config=configs/lm/models.py:size=350m,pretrained=checkpoints/Qwen3-0.6B --workdir=runs/finetuned

Options: `size=`, `mixer=`, `pretrained=`, `source=`, `tokenizer=` (bytes, characters, or bpe:32768), `length=`, `tokens=` (how many to
train on, padding included, such as 200m; one epoch without it) and `rule=` (adamw or muon). The learning rate of `125m` is that of a sweep
over a Transformer, Gated DeltaNet and their hybrid; the others are customary ones.

Sources are stdlib, enwik8, text8, wikitext103, rfc, pg19, lm1b, wiki40b and tiny_shakespeare, each with its usual tokens; all but the
first need `--config.task.official_dir`, an archive or, for the last four, the folder of tensorflow-datasets; for rfc, that of the
texts in Debian's packages doc-rfc-*, /usr/share/doc/RFC, some of which are not UTF-8 and need `--config.task.invalid=replace`. Other texts:
`--config.task.source=PATH`. Published perplexities of WikiText-103 and PG-19 are per word: 2 ** (bits_per_byte * bytes / words),
with the bytes and words of the test split, a line's end counted as a word in WikiText-103.
"""

import pathlib
import re
import runpy

from ml_collections import ConfigDict

# Width, layers, peak learning rate, rows of `LENGTH` tokens per step, what the backward pass recomputes.
SIZES = {
    "10m": (192, 8, 3e-3, 8, "none"),
    "40m": (384, 16, 2e-3, 8, "none"),
    "125m": (768, 12, 1.5e-3, 8, "none"),
    "350m": (1024, 24, 6e-4, 8, "full"),
    "1.3b": (2048, 24, 4e-4, 16, "full"),
}
LENGTH = 4096
# Name of the source in the task, tokens, how documents become rows.
SOURCES = {
    "stdlib": ("stdlib", "bytes", "best_fit"),
    "enwik8": ("enwik8", "bytes", "concatenate"),
    "text8": ("text8", "characters", "concatenate"),
    "wikitext103": ("wikitext103", "bpe:32768", "best_fit"),
    "rfc": ("rfc", "bpe:32768", "best_fit"),
    "pg19": ("tfds:pg19", "bpe:32768", "best_fit"),
    "lm1b": ("tfds:lm1b", "bpe:32768", "best_fit"),
    "wiki40b": ("tfds:wiki40b/en", "bpe:32768", "best_fit"),
    "tiny_shakespeare": ("tfds:tiny_shakespeare", "bytes", "concatenate"),
}
models = runpy.run_path(str(pathlib.Path(__file__).with_name("_architectures.py")))["models"]


def get_config(arg: str = "size=10m,mixer=attention") -> ConfigDict:
    options = dict(pair.partition("=")[::2] for pair in arg.split(",") if pair)
    pretrained = options.pop("pretrained", None)
    if pretrained is not None and "mixer" in options:
        raise ValueError("pretrained= and mixer= exclude each other: the checkpoint has its mixers")
    size, mixer = options.pop("size", "10m"), options.pop("mixer", "attention")
    source, rule = options.pop("source", "stdlib"), options.pop("rule", "adamw")
    tokenizer = options.pop("tokenizer", "")
    length, tokens = options.pop("length", str(LENGTH)), options.pop("tokens", None)
    if options:
        raise ValueError(
            f"models.py takes size=, mixer=, pretrained=, source=, tokenizer=, length=, tokens= and rule=, not {', '.join(options)}"
        )
    if size not in SIZES:
        raise ValueError(f"size={size!r} is unknown; available: {', '.join(SIZES)}")
    if source not in SOURCES:
        raise ValueError(f"source={source!r} is unknown; available: {', '.join(SOURCES)}")
    if not length.isdecimal() or not int(length):
        raise ValueError(f"length={length!r}; expected a number of tokens per row, such as {LENGTH}")
    if tokens is not None and not re.fullmatch(r"[1-9]\d*[kmb]?", tokens):
        raise ValueError(f"tokens={tokens!r}; expected a number of tokens to train on, such as 200m")
    width, depth, rate, rows, remat = SIZES[size]
    known = models(width, depth, int(length))
    if mixer not in known:
        raise ValueError(f"mixer={mixer!r} has no model here; available: {', '.join(known)}")

    config = ConfigDict()
    config.seed = 0
    source, usual, packing = SOURCES[source]
    if pretrained is not None:
        usual = f"{pretrained}/tokenizer.json"
    config.task = dict(
        name="language", source=source, tokenizer=tokenizer or usual, packing=packing, length=int(length)
    )
    config.model = dict(kind="language_model", dtype="bfloat16", remat=remat)
    if pretrained is None:
        config.model.update(tie_embeddings=True, **known[mixer])
    config.train = dict(batch_size=rows, eval_every=0.25, log_every=10, checkpoint_every=500)
    if tokens is None:
        config.train.epochs = 1
    else:
        count = int(tokens.rstrip("kmb")) * {"k": 10**3, "m": 10**6, "b": 10**9}.get(tokens[-1], 1)
        config.train.steps = -(-count // (rows * int(length)))
    if pretrained is not None:
        config.train.pretrained = pretrained
    config.optimizer = dict(
        name=rule, learning_rate=rate, weight_decay=0.1, warmup_steps=100, b2=0.95, clip_norm=1.0
    )
    return config
