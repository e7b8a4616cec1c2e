"""Adapters in commands: trained beside a published checkpoint, resumed, and written in the format of peft."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import convert, evaluate, train
from experiments.config.command_line import load
from experiments.parallel.mesh import Devices
from experiments.training import experiment
from experiments.training.pretrained import initial_state
from seqmodels import load_adapter, load_pretrained
from seqmodels.names import by_layer
from tests.experiments.test_pretrained import CHECKPOINT, CONFIG

LORA = {"rank": "2", "alpha": "6", "targets": "query,down"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    (folder / "config.py").write_text(CONFIG.replace("FOLDER", str(folder)))
    lines = ("abcdefgh"[n % 5 :] + " " + "hgfedcba"[n % 7 :] for n in range(400))
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    return folder


def plan_of(folder, base=CHECKPOINT, **lora):
    fields = {"train.pretrained": str(base), "model.param_dtype": "bfloat16"}
    fields |= {f"train.lora.{name}": value for name, value in (LORA | lora).items()}
    return experiment.build(load(f"{folder}/config.py", list(fields.items())))


@pytest.fixture(scope="module")
def stepped(folder):
    """A plan, its functions, the state before and the forms in which checkpoints hold those after two and four steps."""
    plan, devices = plan_of(folder), Devices.first(1)
    functions = plan.step_functions(devices)
    state = initial_state(plan, functions.layout, devices)
    start = jax.device_get(state)
    stored, batches = [], [devices.put_batch(next(plan.train_batches())) for _ in range(4)]
    for number, batch in enumerate(batches, start=1):
        state, metrics = functions.train(state, batch)
        if number % 2 == 0:
            stored.append(jax.device_get(functions.layout.to_stored(state)))
    return plan, functions, start, stored, (batches, state, metrics)


def test_adapters_alone_are_trained(stepped):
    plan, functions, start, stored, (_, state, _) = stepped
    frozen = plan.model.frozen
    assert all("/adapter/" in name for name in plan.model.parameters)
    assert plan.model.describe() == f"{2 * 2 * (32 + 40)} parameters of adapters beside 5,200 others"
    base = load_pretrained(CHECKPOINT, param_dtype="bfloat16")[0]
    want = by_layer(base)
    split = {}
    for name in frozen:
        np.testing.assert_array_equal(state.statistics[name], start.statistics[name], err_msg=name)
        split |= plan.model.statistics[name].split(state.statistics[name])
    assert split.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(split[name], array, err_msg=name)
    assert split["stack/blocks/1/mixer/query/kernel"].dtype == "bfloat16"
    before, after = (functions.layout.packing.cut(each.parameters) for each in (start, state))
    for name in plan.model.parameters:
        assert after[name].dtype == np.float32
        assert np.all(before[name] == 0) == name.endswith("/b")
        assert not np.array_equal(before[name], after[name]), name
    # Neither the optimizer nor a checkpoint holds what is not trained.
    largest = max(declaration.size for declaration in plan.model.parameters.values())
    total = plan.model.num_parameters
    assert all(leaf.size <= max(largest, total) for leaf in jax.tree.leaves(state.optimizer))
    names = {name.partition("/")[0] for name in stored[0]}
    assert names == {"step", "parameters", "optimizer", "average", "key", "frozen"}
    assert all("adapter" in name for name in stored[0] if name.startswith(("parameters/", "average/")))


def test_the_start_is_the_checkpoint(stepped):
    plan, _, start, _, (batches, *_) = stepped
    model = plan.model.module(stepped[1].layout.packing.cut(start.parameters), start.statistics)
    base = load_pretrained(CHECKPOINT, param_dtype="bfloat16")[0]
    run = jax.jit(lambda model, ids: model(ids)[0])
    np.testing.assert_array_equal(run(model, batches[0]["inputs"]), run(base, batches[0]["inputs"]))


def test_a_resumed_run_is_the_same(stepped, folder, tmp_path):
    _, functions, _, (half, whole), (batches, *_) = stepped
    state = functions.layout.from_stored(half)
    for batch in batches[2:]:
        state, _ = functions.train(state, batch)
    again = jax.device_get(functions.layout.to_stored(state))
    assert again.keys() == whole.keys()
    for name in whole:
        np.testing.assert_array_equal(again[name], whole[name], err_msg=name)
    # A checkpoint of the same shapes and other numbers.
    other = shutil.copytree(CHECKPOINT, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = np.nextafter(tensors["model.norm.weight"], 2, dtype=np.float32)
    save_file(tensors, other / "model.safetensors")
    layout = plan_of(folder, other).step_functions(Devices.first(1)).layout
    with pytest.raises(
        ValueError, match=r"belong to other parameters: .* fingerprint [0-9a-f]{8}, expected "
    ):
        layout.from_stored(half)


@pytest.mark.slow
def test_commands(folder, tmp_path, capsys):
    one, run = "--num_devices=1", tmp_path / "run"
    fields = [f"--config.train.lora.{name}={value}" for name, value in LORA.items()]
    fields += [f"--config={folder}/config.py", f"--config.train.pretrained={CHECKPOINT}"]
    assert train.main([*fields, f"--workdir={run}", one, "--config.optimizer.learning_rate=0.1"]) == 0
    assert "288 parameters of adapters beside 5,200 others" in capsys.readouterr().out
    assert convert.main([str(run), str(tmp_path / "adapter"), "--adapter_only"]) == 0
    assert "adapter: 8 tensors, 288 parameters" in capsys.readouterr().out
    assert convert.main([str(run), str(tmp_path / "merged")]) == 0
    assert convert.main([str(CHECKPOINT), str(tmp_path / "again"), f"--adapter={tmp_path}/adapter"]) == 0
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in ("merged", "again")}) == 1
    options = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (options["r"], options["lora_alpha"]) == (2, 6)
    assert options["base_model_name_or_path"] == str(CHECKPOINT)
    assert load_adapter(load_pretrained(CHECKPOINT)[0], tmp_path / "adapter").stack is not None
    capsys.readouterr()
    assert evaluate.main([f"--workdir={run}", one]) == 0
    loss = json.loads(capsys.readouterr().out)["loss"]
    given = [f"--pretrained={CHECKPOINT}", fields[-2], one]
    assert evaluate.main([*given, f"--adapter={tmp_path}/adapter"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["loss"] == pytest.approx(loss, rel=1e-5)
    assert made["adapter"] == f"{tmp_path}/adapter"
    assert evaluate.main(given) == 0
    assert json.loads(capsys.readouterr().out)["loss"] > loss


@pytest.mark.parametrize(
    "options, message",
    [
        ({"targets": "quer"}, "'quer' fits no linear map; did you mean 'query'?"),
        ({"targets": "query,dwn"}, "'dwn' fits no linear map; did you mean 'down'?"),
        ({"rank": "17"}, "stack/blocks/0/channel/down: rank=17 for a matrix (24, 16); expected at most 16"),
        ({"rank": "99", "targets": "all-linear"}, "lora.rank=99 is above 16"),
        ({"targets": "stack/blocks/0/.*"}, "stack/blocks/1/channel/down, which are stacked; set scan=False"),
        ({"targets": "[query"}, "is no regular expression"),
        ({"rnk": "2"}, "config.train.lora has no field 'rnk'; did you mean 'rank'?"),
    ],
)
def test_options_that_are_refused(folder, options, message):
    with pytest.raises(ValueError) as caught:
        plan_of(folder, **options)
    assert message in str(caught.value)
