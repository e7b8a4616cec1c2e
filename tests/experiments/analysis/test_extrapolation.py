"""Rows longer than those of training: which rule a run has, what is evaluated, and the table."""

import json
import pathlib
import runpy

import pytest

from experiments import train
from experiments.analysis import extrapolation
from experiments.config.files import NAME, root
from experiments.config.loading import to_plain

FILE = root() / NAME / "lm" / "extrapolation.py"
CONFIG = runpy.run_path(str(FILE))


@pytest.mark.parametrize("rule", CONFIG["rules"](128))
def test_a_run_has_the_rule_of_its_config(rule):
    assert extrapolation.rule_of(to_plain(CONFIG["get_config"](f"rule={rule}"))) == rule


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="rule=alibis; expected none|sinusoidal"):
        CONFIG["get_config"]("rule=alibis")


def test_the_table_and_what_is_evaluated():
    folder = pathlib.Path("runs")
    names = [case.name for case in extrapolation.cases({"rope": {0: folder}, "mamba2": {0: folder}})]
    assert names == [
        "rope",
        *(f"rope, {name}" for name in ("linear", "ntk", "yarn", "truncated", "window", "lm_infinite")),
        "mamba2",
        "mamba2, LongMamba",
    ]
    rows = [dict(rule="rope", factor=f, bits_per_byte=b) for f, b in ((1, 2.0), (1, 3.0), (2, 4.0), (2, 4.0))]
    assert extrapolation.table(rows).splitlines()[2] == "| rope | 2.500 ± 0.707 | 4.000 ± 0.000 |"


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    runs, out = tmp_path / "runs", tmp_path / "out"
    assert extrapolation.main([f"--runs={tmp_path}", f"--out={out}"]) == 2
    assert "holds no finished run" in capsys.readouterr().err
    for rule in ("rope", "mamba2"):
        config = f"{FILE}:rule={rule},width=16,length=16,steps=21"
        assert train.main([f"--config={config}", f"--workdir={runs / rule}", "--num_devices=1"]) == 0
    assert extrapolation.main([f"--runs={runs}", f"--out={out}", "--longest=2"]) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    found = {(row["rule"], row["factor"]): row["bits_per_byte"] for row in rows}
    assert len(found) == 2 * 9
    # What changes nothing at the length of training.
    for name in ("linear", "ntk", "yarn", "window", "lm_infinite"):
        assert found[f"rope, {name}", 1] == pytest.approx(found["rope", 1], abs=1e-4)
        assert found[f"rope, {name}", 2] != pytest.approx(found["rope", 2], abs=1e-6)
    assert found["mamba2, LongMamba", 1] == pytest.approx(found["mamba2", 1], abs=1e-4)
    assert (out / "table.md").exists()
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
