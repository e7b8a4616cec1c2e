"""What a training step spends its time on: kernels of a trace, source files of a compiled program, the command."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import profile
from experiments.analysis.hlo_sources import attribute, kernel_sources
from experiments.benchmark.timing import Timing
from experiments.parallel.mesh import Devices
from experiments.profile import Kernel
from experiments.training import experiment
from layers.kernels import dispatch
from tests.experiments.tiny import build_tiny_model, make_tiny_task, tiny_config

# Frames: 1 the training step, 2 norms in it, 3 a library in norms, 4 a mixer in it, 5 a library on its own,
# 6 a script in the folder that is none of ours. Parents are written plus one.
HLO = """HloModule jit_step, is_scheduled=true

FileNames
1 "/code/experiments/training/step.py"
2 "/code/layers/norms.py"
3 "/code/.venv/lib/flax/nnx/linear.py"
4 "/code/layers/mixers/state_space/s5.py"
5 "/code/script.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
3 {file_name_id=3 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
4 {file_name_id=4 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
5 {file_name_id=5 function_name_id=1 line=1 end_line=1 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}
4 {file_location_id=4 parent_frame_id=2}
5 {file_location_id=3 parent_frame_id=1}
6 {file_location_id=5 parent_frame_id=1}


%fused_computation.14 (param_0: f32[4]) -> f32[4] {
  %param_0 = f32[4]{0} parameter(0)
  %mul.1 = f32[4]{0} multiply(%param_0, %param_0), metadata={op_name="jit(step)/mul" stack_frame_id=4}
  %neg.1 = f32[4]{0} negate(%mul.1), metadata={op_name="jit(step)/neg" stack_frame_id=3}
  %abs.1 = f32[4]{0} abs(%neg.1), metadata={op_name="jit(step)/abs" stack_frame_id=5}
  %exp.1 = f32[4]{0} exponential(%abs.1), metadata={op_name="jit(step)/exp" stack_frame_id=5}
  ROOT %add.1 = f32[4]{0} add(%exp.1, %neg.1), metadata={op_name="jit(step)/add" stack_frame_id=2}
}

%plain_computation (param_0.1: f32[4]) -> f32[4] {
  %param_0.1 = f32[4]{0} parameter(0)
  ROOT %neg.2 = f32[4]{0} negate(%param_0.1)
}

ENTRY %main.9 (x.1: f32[4]) -> (f32[4]) {
  %x.1 = f32[4]{0} parameter(0), metadata={op_name="x"}
  %loop_add_fusion.14 = f32[4]{0} fusion(%x.1), kind=kLoop, calls=%fused_computation.14, metadata={stack_frame_id=4}
  %wrapped_neg = f32[4]{0} fusion(%loop_add_fusion.14), kind=kLoop, calls=%plain_computation, metadata={stack_frame_id=1}
  %custom-call.2 = f32[4]{0} custom-call(%wrapped_neg), custom_call_target="__cublas$gemm", metadata={stack_frame_id=4}
  %copy.3 = f32[4]{0} copy(%custom-call.2), metadata={op_name="jit(step)/copy" stack_frame_id=6}
  ROOT %tuple.1 = (f32[4]{0}) tuple(%copy.3)
}
"""
SOURCES = {
    "loop_add_fusion_14": "layers/norms.py",  # three instructions in norms and below, one in the mixer
    "wrapped_neg": "experiments/training/step.py",  # nothing inside tells
    "custom_call_2": "layers/mixers/state_space/s5.py",
    "copy_3": "other",
}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(experiment, "make_task", make_tiny_task)
    monkeypatch.setattr(experiment, "build_model", build_tiny_model)


def unshifted(hlo):
    """The same module with parents as they are, 0 for none."""
    for parent in (1, 2, 3):
        hlo = hlo.replace(f"parent_frame_id={parent}}}", f"parent_frame_id={parent - 1}}}")
    return hlo


@pytest.mark.parametrize("hlo", [HLO, unshifted(HLO)], ids=["parent plus one", "parent"])
def test_a_kernel_belongs_to_the_innermost_file_of_ours_of_most_of_its_instructions(hlo):
    sources = kernel_sources(hlo, Path("/code"))
    assert {name: sources[name] for name in SOURCES} == SOURCES
    assert set(kernel_sources(hlo, Path("/elsewhere")).values()) == {"other"}


def test_the_instruction_that_launched_a_kernel_is_asked_before_its_name():
    assert attribute("cutlass_gemm", "custom-call.2", SOURCES) == "layers/mixers/state_space/s5.py"
    assert attribute("loop_add_fusion_14", "wrapped_neg", SOURCES) == "experiments/training/step.py"
    assert attribute("loop_add_fusion_14", "unknown.1", SOURCES) == "layers/norms.py"
    assert attribute("memcpy32_post", None, SOURCES) == "other"
    assert attribute("linear_recurrence_mosaic_gpu_kernel", None, SOURCES) == "Pallas: linear_recurrence"


def test_only_streams_of_gpus_count_and_figures_are_of_one_step():
    def event(name, nanoseconds, **stats):
        return SimpleNamespace(name=name, duration_ns=nanoseconds, stats=list(stats.items()))

    def plane(name, line, *events):
        return SimpleNamespace(name=name, lines=[SimpleNamespace(name=line, events=events)])

    planes = [
        plane("/host:CPU", "Stream", event("host", 9e6)),
        plane("/device:GPU:0", "XLA Modules", event("jit_step", 9e6)),
        plane(
            "/device:GPU:0",
            "Stream #13(Compute)",
            *(
                event("loop_add_fusion_14", 2e6),
                event("loop_add_fusion_14", 1e6),
                event("memcpy32_post", 1e6),
            ),
            event("cutlass_gemm", 4e6, hlo_op="custom-call.2", hlo_module="jit_step"),
        ),
    ]
    kernels = profile.kernels_in(planes)
    assert kernels[-1] == Kernel("cutlass_gemm", "custom-call.2", 4.0)
    record = profile.summarize(kernels, SOURCES, steps=2, timing=Timing(5.0, 4.5, 6.0))
    assert record == dict(
        milliseconds_per_step=5.0,
        quartiles_milliseconds_per_step=[4.5, 6.0],
        busy_milliseconds_per_step=4.0,
        kernels_per_step=2.0,
        sources={
            "layers/mixers/state_space/s5.py": dict(milliseconds=2.0, kernels=0.5, share=0.5),
            "layers/norms.py": dict(milliseconds=1.5, kernels=1.0, share=0.375),
            "other": dict(milliseconds=0.5, kernels=0.5, share=0.125),
        },
    )
    assert list(record["sources"]) == ["layers/mixers/state_space/s5.py", "layers/norms.py", "other"]
    others = {"linear_recurrence/xla": dict(milliseconds_per_step=7.5)}
    about = dict(devices="1 x GPU", batch={"inputs": (8, 4)}, others=others)
    table = profile.describe(record | about).splitlines()
    assert table[:2] == [
        "1 x GPU, batch 8 x 4: 5.00 ms a step, kernels 4.00 ms",
        "with linear_recurrence/xla: 7.50 ms a step, 1.50x",
    ]
    assert [line.split() for line in table[4:]] == [
        ["layers/norms.py", "1.500", "37.5%", "1"],
        ["other", "0.500", "12.5%", "0"],
        ["all", "4.000", "100.0%", "2"],
    ]


def test_the_batch_is_of_one_bucket(tiny):
    plan = experiment.build(tiny_config(train=dict(batch_size=40)))
    for width, shortest in ((4, 2), (8, 5)):
        batch = profile.training_batch(plan, width)
        lengths = (batch["segment_ids"] != 0).sum(1)
        assert batch["inputs"].shape == (40, width)
        assert (lengths.min(), lengths.max()) == (shortest, width)
    assert profile.training_batch(plan, None)["inputs"].shape == (40, 8)  # lengths 2 to 8, so more than 4
    with pytest.raises(ValueError, match="width=5; training batches have the widths 4, 8"):
        profile.training_batch(plan, 5)


def test_a_step_is_timed_and_traced_and_its_frames_are_read(tiny, monkeypatch):
    plan, devices = experiment.build(tiny_config()), Devices.first(1)
    found = {}

    def read(hlo, root):
        found.update(kernel_sources(hlo, root))
        return found

    monkeypatch.setattr(profile, "kernel_sources", read)
    monkeypatch.setattr(profile, "kernels_in", lambda planes: [Kernel("fusion", None, 3.0)])
    others = {"linear_recurrence/reference": {"linear_recurrence": "reference"}}
    asked, preferred = [], dispatch.preferred
    monkeypatch.setattr(dispatch, "preferred", lambda choices: asked.append(choices) or preferred(choices))
    record = profile.profile_step(plan, devices, profile.training_batch(plan, 4), 2, {}, others)
    assert asked == [{}, *others.values()]
    assert record["busy_milliseconds_per_step"] == 1.5
    assert record["milliseconds_per_step"] > 0
    assert record["others"]["linear_recurrence/reference"]["milliseconds_per_step"] > 0
    files = set(found.values()) - {"other"}
    assert {"experiments/training/optimizers/transforms.py", "experiments/tasks/classification.py"} <= files
    assert [file for file in files if not (profile.ROOT / file).is_file()] == []


def test_a_trace_without_kernels_is_an_error():
    with pytest.raises(RuntimeError, match="no kernels of a GPU"):
        profile.summarize([], SOURCES, steps=1, timing=Timing(1.0, 1.0, 1.0))


def test_without_a_gpu_the_command_refuses_before_anything_is_made(tmp_path):
    command = [sys.executable, "-m", "experiments.profile", f"--out={tmp_path / 'out'}"]
    done = subprocess.run(
        [*command, "--config=configs/lra/listops.py:mixer=s5"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=60,  # making the data of this config takes longer
    )
    assert done.returncode == 2
    assert done.stderr == ("Profiling needs a GPU, whose kernels the trace names; JAX has found cpu only.\n")
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_preferences():
    assert profile.preferences(["linear_recurrence/gpu", "attention/xla"]) == {
        "linear_recurrence": "gpu",
        "attention": "xla",
    }
    with pytest.raises(ValueError, match="prefer='linear_recurrence/cpu' is no implementation"):
        profile.preferences(["linear_recurrence/cpu"])
    with pytest.raises(ValueError, match="compare='s5' is no implementation"):
        profile.preferences(["s5"], "compare")
