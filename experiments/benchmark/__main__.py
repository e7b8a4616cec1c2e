"""Times the primitives: beside floors and other implementations, or against the length of the sequence.

    python -m experiments.benchmark kernels [--peers] [--only=delta_rule/KDA,linear_recurrence] [--out=FOLDER]
    python -m experiments.benchmark scaling [--only=mixer,mixer/luna,delta_rule] [--lengths=2048,8192,32768,131072] [--out=FOLDER]
    python -m experiments.benchmark steps [--only=gated_deltanet,attention] [--rows=whole,packed] [--num_devices=2] [--size=1.3b]
    python -m experiments.benchmark decode [--only=mamba2,attention] [--batch=8] [--lengths=1024,16384] [--cache="snapkv(budget=1024)"] [--out=FOLDER]
    python -m experiments.benchmark parallel [--only=attention,delta_rule/all_scan] [--num_devices=8] [--latency=1e-5] [--out=FOLDER]
    python -m experiments.benchmark long_rows [--only=links,train/gated_deltanet] [--num_devices=2] [--time=262144] [--out=FOLDER]
    python -m experiments.benchmark weak_scaling [--only=gated_deltanet] [--num_devices=8] [--size=1.3b] [--out=FOLDER]
    python -m experiments.benchmark pretrained [--only=load,decode/llama] [--size=1.5b] [--out=FOLDER]
    python -m experiments.benchmark tune [--only=linear_recurrence/real] [--out=FOLDER]

`kernels` prints a table and writes kernels.json and kernels.png: milliseconds (median of interleaved measurements) of the forward pass and
of both passes, the ratio to the floor, the ratio to what `impl=None` takes, memory, and errors against the float64 reference. The floor is
the larger of the fewest bytes over the bandwidth of a copy and the arithmetic over the rate of the unit that does it, both measured at the
start. On a CPU the sizes are smaller and the inputs float32. `scaling` with `--only=mixer` times whole mixers of the attention family beside
softmax attention (`experiments/benchmark/mixer_scaling.py`), and writes table.md too. On a GPU `--workers` processes compile and check in parallel, which takes
longer than timing; `--patience` bounds it. `steps` times whole training steps of language models (`experiments/benchmark/steps.py`), with
`--workers` in processes that compile beside each other and measure in turn, and `decode` steps of their generation against batch and
context. `parallel` counts what divided time sends between devices, beside the published formulas, times it on those that there are, and
extends the formulas to 1,024 devices by a model of links (`experiments/benchmark/parallel.py`), in parallel.json and parallel.png;
`--links` takes the links from what `long_rows` measured. `long_rows` trains and reads rows that devices share
(`experiments/benchmark/long_rows.py`), prints a line of JSON per case and writes long_rows.json. `weak_scaling` takes training steps with
as many rows per device on 1, 2, 4, ... devices (`experiments/benchmark/weak_scaling.py`), in weak_scaling.json and weak_scaling.png.
`pretrained` writes random checkpoints in the format of transformers, loads them, and generates beside transformers where that can be
imported (`experiments/benchmark/pretrained.py`); it writes pretrained.json. `tune` checks and times layouts of the GPU kernels and writes
tune.json. Exit codes: 0 done; 1 one of our implementations failed or a process ended, the others are in the table; 2 an argument cannot be
used.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax

from experiments.benchmark import (
    decode,
    kernels,
    long_rows,
    mixer_scaling,
    models,
    parallel,
    parallel_packing,
    parallel_row,
    peers,
    pretrained,
    report,
    scaling,
    steps,
    tune,
    weak_scaling,
)
from experiments.benchmark.parallel_methods import Sizes
from experiments.benchmark.processes import EndedEarly
from experiments.benchmark.timing import ceilings
from experiments.config.command_line import (
    ArgumentError,
    Parser,
    cache_policy,
    folder,
    names,
    path,
    positive_integer,
    positive_integers,
    positive_number,
    reporting,
)
from experiments.data.text.sources import read_documents
from experiments.parallel.mesh import Devices
from experiments.runs.files import to_json_text, write_atomically
from experiments.runs.sessions import git_revision, versions
from layers.kernels.suites import SUITES

STUDIES = (
    "kernels",
    "scaling",
    "steps",
    "decode",
    "parallel",
    "long_rows",
    "weak_scaling",
    "pretrained",
    "tune",
)
MODELS = ("steps", "decode")  # studies of whole models
# Options that a study reads, beside --only, --rounds and --out.
READS = {
    "kernels": {"peers", "dtype", "batch", "time", "narrower", "workers", "patience"},
    "scaling": {"dtype", "narrower", "workers", "lengths"},
    "steps": {"batch", "time", "rows", "num_devices", "size", "unrolled", "prefer", "workers", "patience"},
    "decode": {"batch", "lengths", "size", "cache"},
    "parallel": {
        "batch",
        "time",
        "dtype",
        "num_devices",
        "latency",
        "bandwidth",
        "flops",
        "row",
        "chunk",
        "packing",
        "links",
    },
    "long_rows": {"time", "num_devices", "size", "remat", "prefer", "patience", "workers"},
    "weak_scaling": {"batch", "time", "num_devices", "size", "unrolled", "prefer", "patience"},
    "pretrained": {"size", "patience"},
    "tune": {"batch", "time", "narrower"},
}
PATIENCE = 300.0  # seconds for a case of `long_rows` and, with --workers, of `steps`
CHUNK = 65536  # tokens of a chunk of the row that `parallel` reads twice
# Of the simulation of documents of different lengths: numbers of devices, and tokens that one holds.
DEVICES, CAPACITY = (8, 16, 32, 64, 128, 256), 16384
LENGTHS = (2048, 8192, 32768, 131072)  # of `scaling`
ON_CPU = {"dtype": "float32", "batch": 1, "time": 1024, "narrower": 8, "rounds": 5, "workers": 1}


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Runs a study and returns the exit code."""
    values = _parser().parse_args(argv)
    study = values.study
    _check_read(values)
    if study == "long_rows":
        given = dict(rounds=values.rounds, remat=values.remat, prefer=_preferred(values.prefer))
        given = {name: value for name, value in given.items() if value is not None}
        setting = long_rows.Setting(values.time, values.size, values.num_devices, **given)
        patience = values.patience or PATIENCE
        return long_rows.study(values.out, setting, values.only, patience, values.workers or 1)
    if study == "weak_scaling":
        options = values.size, values.batch, values.time, values.unrolled, values.rounds or 5
        setting = weak_scaling.Setting(*options, _preferred(values.prefer) or {})
        return weak_scaling.study(
            values.out, setting, values.only, values.num_devices, values.patience or PATIENCE
        )
    if study == "pretrained":
        return pretrained.study(values.out, values.size, values.only, values.rounds, values.patience)
    _share_memory(1 if study in (*MODELS, "parallel", "tune") else values.workers or kernels.Options.workers)
    options, preferred = _options(values), _preferred(values.prefer) or {}
    chosen = list(kernels.selected(options.only)) if study == "kernels" else []
    if study == "scaling":
        scaling.chosen(options.only)  # raises for an unknown name before anything is computed
    out = values.out
    device = Devices.first(1).describe()
    record: dict[str, Any] = dict(
        command=["experiments.benchmark", *sys.argv[1:]],
        device=device,
        versions=versions() | (peers.versions() if options.peers else {}),
        git=git_revision(),
        rounds=options.rounds,
    )
    if study == "parallel":
        return _parallel(values, record)
    if study == "tune":
        return _tune(options.only, values, record)
    rows: list[dict[str, Any]] = []

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def add(row: dict[str, Any], line: str) -> None:
        """Prints a row and stores all rows, so that an interrupted run keeps them."""
        print(line, flush=True)
        rows.append(row)
        store()

    def store() -> None:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / f"{study}.json", to_json_text(record | {"rows": rows}))

    problems = []
    try:
        if study == "kernels":
            limits = {dtype: ceilings(dtype) for dtype in {options.dtype or c.dtype for _, _, c in chosen}}
            record["ceilings"] = {dtype: limit._asdict() for dtype, limit in limits.items()}
            print(f"{device}; {_describe(limits)}\n{report.HEADER}", flush=True)
            rows[:] = kernels.run(options, limits, lambda row: add(row, report.line(row)), say)
        elif study == "steps":
            setting = steps.Setting(
                values.size,
                values.batch,
                values.time,
                values.num_devices or 1,
                values.unrolled,
                values.rounds or 5,
                preferred,
            )
            named = steps.cases(setting, values.only, values.rows or steps.ROWS)
            record["rounds"], record["device"] = setting.rounds, Devices.first(setting.count).describe()
            print(record["device"], flush=True)
            patience = values.patience or PATIENCE
            steps.run(setting, named, lambda row: add(row, steps.line(row)), say, values.workers, patience)
            problems += [steps.line(row) for row in rows if "failed" in row]
        elif study == "decode":
            rounds = values.rounds or 5
            record["rounds"] = rounds
            print(device, flush=True)
            batches = values.batch and (values.batch,)
            decode.run(
                values.only,
                values.size,
                batches,
                values.lengths,
                rounds,
                lambda row: add(row, decode.line(row)),
                say,
                values.cache,
            )
            decode.draw(rows, out / "decode.png", device)
        else:
            print(f"{device}; one row; both passes", flush=True)
            lengths = values.lengths or LENGTHS
            rows[:] = scaling.run(options, lengths, lambda row: add(row, _scaling_line(row)), say)
        store()
    except EndedEarly as error:
        problems.append(str(error))
    if study == "kernels":
        problems += [report.line(row) for row in kernels.failures(rows)]
    if rows and study not in MODELS:
        draw = report.draw_bars if study == "kernels" else report.draw_scaling
        draw(rows, out / f"{study}.png", device)
        if any(row["primitive"] == mixer_scaling.PREFIX for row in rows):
            write_atomically(out / "table.md", text := mixer_scaling.table(rows))
            print(f"\n{text}", end="")
    for problem in problems:
        say(problem)
    return 1 if problems else 0


def _check_read(values: Any) -> None:
    """Raises ArgumentError if an option is given that the study does not read."""
    for name in set().union(*READS.values()) - READS[values.study]:
        if getattr(values, name) not in (None, False):
            reading = ", ".join(f"--{other}" for other in sorted(READS[values.study]))
            raise ArgumentError(f"--{name} has no effect on {values.study}, which takes {reading}")
    if values.study == "steps" and values.patience is not None and values.workers is None:
        raise ArgumentError("--patience has no effect on steps without --workers")
    known = pretrained.SIZES if values.study == "pretrained" else tuple(models.SIZES)
    if values.size is not None and values.size not in known:
        raise ArgumentError(f"--size={values.size} is no size of {values.study}; expected {', '.join(known)}")


def _share_memory(workers: int) -> None:
    """Makes the processes that share the accelerator allocate memory on demand.

    Each may take more than an equal part: the one that measures needs the most, while others hold little.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9" if workers == 1 else "0.4")


def _tune(only: tuple[str, ...], values: Any, record: dict[str, Any]) -> int:
    limit = ceilings("float32")
    record["ceilings"] = limit._asdict()
    print(f"{record['device']}; {_describe({'float32': limit})}", flush=True)
    sizes = tune.Sizes(values.batch, values.time, values.narrower or 1, values.rounds or tune.Sizes.rounds)

    def keep(rows: list[dict[str, Any]]) -> None:
        values.out.mkdir(parents=True, exist_ok=True)
        write_atomically(values.out / "tune.json", to_json_text(record | {"rows": rows}))

    tune.run(only, sizes, limit.bytes, lambda line: print(line, flush=True), keep)
    return 0


def _preferred(pairs: Sequence[str] | None) -> dict[str, str] | None:
    """Implementations by primitive from texts such as "delta_rule/gpu"."""
    if pairs is None:
        return None
    for pair in pairs:
        primitive, _, name = pair.partition("/")
        suite = SUITES.get(primitive)
        if suite is None or name not in suite.implementations + suite.gpu_implementations:
            raise ArgumentError(f"--prefer={pair}; expected primitive/implementation, such as delta_rule/gpu")
    return dict(pair.split("/") for pair in pairs)


def _parallel(values: Any, record: dict[str, Any]) -> int:
    if values.chunk and not values.row:
        raise ArgumentError("--chunk has no effect without --row")
    devices = Devices.first(values.num_devices).mesh.devices.flatten().tolist()
    on_cpu = devices[0].platform == "cpu"
    small = {"heads": 8, "kv_heads": 2, "head_dim": 16, "dtype": "float32"} if on_cpu else {}
    given = {"batch": values.batch or 1, "time": values.time or (512 if on_cpu else 32768)}
    given |= {"dtype": values.dtype} if values.dtype else {}
    sizes, large = Sizes(**small | given), Sizes(1, parallel.MODEL_TIME)
    assumed = {name: getattr(values, name) for name in ("latency", "bandwidth", "flops")}
    links = parallel.Links() if values.links is None else parallel.read_links(values.links)
    links = dataclasses.replace(
        links, **{name: value for name, value in assumed.items() if value is not None}
    )
    record |= dict(rounds=values.rounds or 3, device=f"{len(devices)} x {devices[0].device_kind}")
    record["model"] = dict(sizes=dataclasses.asdict(large), assumptions=dataclasses.asdict(links))
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        if not rows:
            print(f"{record['device']}{', emulated' if on_cpu else ''}\n{parallel.HEADER}", flush=True)
        print(parallel.line(row), flush=True)
        rows.append(row)

    chunk = values.chunk or CHUNK
    if values.row:
        parallel_row.check(values.row, chunk, devices)
    parallel.run(values.only, sizes, devices, record["rounds"], add)
    if values.row:
        record["row"] = parallel_row.compare(values.row, chunk, devices)
        print(parallel_row.line(record["row"]), flush=True)
    if values.packing:
        lengths = [len(text.encode()) for text in read_documents("stdlib")["train"]]
        model = parallel_packing.Model(large, links, CAPACITY)
        record["packing"] = [parallel_packing.simulated(lengths, n, model, batch=n) for n in DEVICES]
        print("", *map(parallel_packing.line, record["packing"]), sep="\n", flush=True)
    record["model"]["rows"] = parallel.extrapolated(values.only, large, links)
    print(f"\nA model of a layer, both passes, {large.batch} x {large.time} tokens; {links.describe()}")
    print("\n".join(parallel.model_lines(record["model"]["rows"])), flush=True)
    values.out.mkdir(parents=True, exist_ok=True)
    write_atomically(values.out / "parallel.json", to_json_text(record | {"rows": rows}))
    parallel.draw(record["model"]["rows"], values.out / "parallel.png", large, links)
    if values.packing:
        parallel_packing.draw(record["packing"], values.out / "packing.png", links)
    return 0


def _options(values: Any) -> kernels.Options:
    defaults = ON_CPU if jax.default_backend() == "cpu" else {}
    given = {
        name: getattr(values, name)
        for name in ("dtype", "batch", "time", "narrower", "rounds", "workers", "patience")
    }
    given = {name: value for name, value in given.items() if value is not None}
    return kernels.Options(only=values.only, peers=values.peers, **(defaults | given))


def _describe(limits: dict[str, Any]) -> str:
    parts = [f"{limit.matrix / 1e12:.3g} TFLOP/s of {dtype} products" for dtype, limit in limits.items()]
    limit = next(iter(limits.values()))
    parts += [f"{limit.vector / 1e12:.3g} TFLOP/s otherwise", f"copy {limit.bytes / 1e9:.0f} GB/s"]
    return ", ".join(parts)


def _scaling_line(row: dict[str, Any]) -> str:
    label = f"{row['primitive']}: {row['case']}"
    return f"{label:45}  {row['time']:7}  {row['both_ms']:10.3f} ms  {row['both_peak_bytes'] / 1e9:7.3f} GB"


def _parser() -> Parser:
    parser = Parser("experiments.benchmark", __doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument(
        "--out",
        type=folder,
        default="runs/benchmark",
        help="folder for the results; made if it does not exist",
    )
    parser.add_argument(
        "--only", type=names, default=(), help="primitives, or primitive/case, to time, separated by commas"
    )
    parser.add_argument(
        "--peers", action="store_true", help="time other libraries that can be imported, and plain JAX"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="type of real inputs")
    parser.add_argument("--batch", type=positive_integer, help="rows, in place of each benchmark's own")
    parser.add_argument("--time", type=positive_integer, help="tokens, in place of each benchmark's own")
    parser.add_argument(
        "--narrower", type=int, choices=(1, 2, 4, 8), help="divides the number of heads or channels"
    )
    parser.add_argument("--rounds", type=positive_integer, help="measurements of every function")
    parser.add_argument("--workers", type=positive_integer, help="processes that trace and compile")
    parser.add_argument(
        "--patience",
        type=positive_number,
        help="seconds for one implementation to compile and be checked, or for a case of `long_rows` and `weak_scaling`",
    )
    parser.add_argument(
        "--rows", type=names, help="kinds of rows, for `steps`: whole, ones and packed (default: all)"
    )
    parser.add_argument(
        "--size",
        choices=tuple(dict.fromkeys((*models.SIZES, *pretrained.SIZES))),
        help="size of the models, for `steps`, `decode` and `long_rows` (default: 125m; tiny on a CPU) and for `pretrained` "
        "(default: 1.5b; tiny on a CPU)",
    )
    parser.add_argument(
        "--cache",
        type=cache_policy,
        metavar="NAME(KEY=VALUE,...)",
        help="policy of the caches of attention, for `decode`; `list caches` shows them",
    )
    parser.add_argument(
        "--unrolled", action="store_true", help="compile layers one by one, not under a scan, for `steps`"
    )
    parser.add_argument(
        "--num_devices",
        type=positive_integer,
        help="devices, for `steps` (default: 1), `parallel`, `long_rows` and `weak_scaling` (default: all)",
    )
    parser.add_argument(
        "--remat",
        choices=("none", "full", "dots", "attention"),
        help="what the backward pass of the cases `train` recomputes, for `long_rows` (default: attention)",
    )
    parser.add_argument(
        "--prefer",
        type=names,
        help="implementations that are taken wherever they can be, such as delta_rule/gpu, for `steps` and `long_rows`",
    )
    parser.add_argument(
        "--links",
        type=path,
        help="long_rows.json with a case `links`, whose numbers the model of `parallel` takes in place of assumed ones",
    )
    parser.add_argument(
        "--row", type=positive_integer, help="tokens of one more row, for `parallel`: see --chunk"
    )
    parser.add_argument(
        "--chunk",
        type=positive_integer,
        help=f"tokens in which one device reads --row, for `parallel` (default: {CHUNK}); the outputs are compared with those "
        "of all devices at once",
    )
    parser.add_argument(
        "--packing",
        action="store_true",
        help="simulate devices by document, for the lengths in bytes of Python's standard library, for `parallel`",
    )
    for name, what in (
        ("latency", "seconds per message"),
        ("bandwidth", "bytes per second that a device sends"),
        ("flops", "FLOPs per second of a device"),
    ):
        default = getattr(parallel.Links, name)
        parser.add_argument(
            f"--{name}",
            type=positive_number,
            help=f"{what}, assumed by the model of `parallel` (default: {default:g})",
        )
    parser.add_argument(
        "--lengths",
        type=positive_integers,
        help="tokens per row, for `scaling`, or of context, for `decode`",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
