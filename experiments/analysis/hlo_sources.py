"""Source files of GPU kernels, read from the text of the compiled program.

The text of a module that XLA has optimised starts with tables of the Python frames that its instructions were traced
in, and an instruction names the innermost one by `stack_frame_id`. A kernel runs one instruction, in most cases a
fusion, whose computation lists what was fused.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

OTHER = "other"
FOLDERS = ("configs", "experiments", "layers", "seqmodels")

_MOSAIC = "_mosaic_gpu_kernel"
_FIELD = re.compile(r"(\w+)=(\d+)")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")
_CALLS = re.compile(r"[ ,]calls=%?([\w.\-]+)")
_FRAME = re.compile(r"[ {]stack_frame_id=(\d+)")


def kernel_sources(hlo: str, root: Path) -> dict[str, str]:
    """Returns the source file of each instruction that a kernel may run.

    A fusion belongs to the file that most of its instructions were traced in, by the innermost frame inside `root`; on a
    tie, to the first one.

    Args:
      hlo: text of a compiled module, `jax.stages.Compiled.as_text()`.
      root: folder of our sources, as the paths in the text name it.

    Returns:
      files relative to `root`, such as "layers/norms.py", or "other" if no frame lies in `root`; by names of instructions
      as kernels spell them (see `kernel_name`).
    """
    files = _frame_files(hlo, root)
    fused: dict[str, Counter[str]] = {}
    instructions = []
    for computation, name, called, frame in _instructions(hlo):
        file = files.get(frame, OTHER)
        instructions.append((name, called, file))
        if file != OTHER:
            fused.setdefault(computation, Counter())[file] += 1
    sources = {}
    for name, called, file in instructions:
        inside = fused.get(called)
        sources[kernel_name(name)] = inside.most_common(1)[0][0] if inside else file
    return sources


def kernel_name(instruction: str) -> str:
    """Returns an instruction's name in the form of its kernel, with "_" for characters that C identifiers exclude."""
    return re.sub(r"\W", "_", instruction, flags=re.ASCII)


def attribute(kernel: str, operation: str | None, sources: Mapping[str, str]) -> str:
    """Returns the source file of a kernel in a trace, or "other"; "Pallas: name" for a Mosaic GPU kernel.

    Args:
      operation: name of the instruction that launched the kernel, if the trace has it. It takes precedence: library
        kernels have their own names, and equal instructions share one kernel, named after the first.
      sources: files from `kernel_sources`.
    """
    if kernel.endswith(_MOSAIC):  # these name no instruction, and several launch the same one
        return f"Pallas: {kernel.removesuffix(_MOSAIC)}"
    for name in (operation, kernel):
        if name is not None and (file := sources.get(kernel_name(name))) is not None:
            return file
    return OTHER


def _frame_files(hlo: str, root: Path) -> dict[int, str]:
    """Returns the innermost file inside `root` of each frame that has one."""
    names = _table(hlo, "FileNames")
    locations, frames = (
        {number: {key: int(value) for key, value in _FIELD.findall(row)} for number, row in table.items()}
        for table in (_table(hlo, "FileLocations"), _table(hlo, "StackFrames"))
    )
    # Frames count from 1. XLA writes the parent, 0 for none, or the parent plus one: outermost frames distinguish the two.
    shift = min((frame["parent_frame_id"] for frame in frames.values()), default=0)
    files: dict[int, str] = {}
    for number, frame in sorted(frames.items()):  # parents precede their callees
        name = names[locations[frame["file_location_id"]]["file_name_id"]]
        file = _ours(name.strip('"'), root) or files.get(frame["parent_frame_id"] - shift)
        if file is not None:
            files[number] = file
    return files


def _table(hlo: str, name: str) -> dict[int, str]:
    found = re.search(rf"^{name}\n((?:\d+ .*\n)*)", hlo, re.MULTILINE)
    rows = (row.partition(" ") for row in found[1].splitlines()) if found else ()
    return {int(number): rest for number, _, rest in rows}


def _ours(file: str, root: Path) -> str | None:
    """Returns the path relative to `root`, or None if the file is not in one of our folders."""
    path = Path(file).relative_to(root) if Path(file).is_relative_to(root) else Path()
    return path.as_posix() if path.parts and path.parts[0] in FOLDERS else None


def _instructions(hlo: str) -> Iterator[tuple[str, str, str | None, int]]:
    """Yields computation, name, called computation and frame (0 for none) of each instruction."""
    computation = ""
    for line in hlo.splitlines():
        if found := _INSTRUCTION.match(line):
            called, frame = _CALLS.search(line), _FRAME.search(line)
            yield computation, found[1], called and called[1], int(frame[1]) if frame else 0
        elif found := _COMPUTATION.match(line):
            computation = found[1]
