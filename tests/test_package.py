"""What is installed: configs, the command `seqmodels`, the version, and modules of a user that hide ours."""

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import tomllib

import pytest

import seqmodels
from experiments import __main__ as command
from experiments.config import files
from seqmodels import neighbours

ROOT = pathlib.Path(__file__).resolve().parents[1]
BUILT_FROM = (
    "configs",
    "experiments",
    "layers",
    "seqmodels",
    "LICENSE",
    "README.md",
    "pyproject.toml",
    "setup.py",
)


def test_the_version_is_that_of_the_installed_package():
    assert seqmodels.__version__ == importlib.metadata.version("jax-seqmodels")


def test_the_command_names_all_commands(capsys):
    assert command.main(["--help"]) == 0
    said = capsys.readouterr().out
    for name, module in command.MODULES.items():
        assert f"\n  {name} " in said
        assert callable(importlib.import_module(module).main)
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == seqmodels.__version__
    assert command.main(["list", "configs"]) == 0
    assert "configs/lra/listops.py" in capsys.readouterr().out


def test_a_config_is_found_by_a_part_of_its_path_and_that_of_the_user_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = files.root() / "configs/lra/listops.py"
    for name in ("configs/lra/listops.py", "configs/lra/listops", "lra/listops.py", "lra/listops", "listops"):
        assert files.find(name) == ours
    own = pathlib.Path("configs/lra/listops.py")
    own.parent.mkdir(parents=True)
    own.write_text("")
    assert files.find("configs/lra/listops.py") == own
    assert files.find("lra/listops") == ours


def test_one_name_is_that_of_one_config():
    stems = [file.stem for file in files.shipped().values()]
    assert len(stems) == len(set(stems))


def test_a_module_that_hides_layers_is_named(tmp_path, monkeypatch):
    neighbours.check(ROOT)
    with pytest.raises(ImportError, match=f"seqmodels needs the package `layers` in {tmp_path}"):
        neighbours.check(tmp_path)
    (tmp_path / "layers").mkdir()
    with pytest.raises(ImportError, match=rf"^{ROOT / 'layers'} hides the package `layers` of seqmodels"):
        neighbours.check(tmp_path)
    own = tmp_path / "layers.py"
    own.write_text("")
    monkeypatch.delitem(sys.modules, "layers")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=rf"^{own} hides the package `layers` of seqmodels"):
        neighbours.check(ROOT)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel of a copy of the sources installed into it."""
    sources, wheels, target = (tmp_path_factory.mktemp(name) for name in ("sources", "wheels", "target"))
    for name in BUILT_FROM:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        more = {"ignore": shutil.ignore_patterns("__pycache__", "results")} if copy is shutil.copytree else {}
        copy(ROOT / name, sources / name, **more)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={wheels}", sources], check=True
    )
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", f"--target={target}", wheel], check=True)
    return target


def run(target, folder, *words):
    environment = os.environ | {"PYTHONPATH": str(target), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_wheel_works_in_any_folder(installed, tmp_path):
    for package in ("experiments", "layers", "seqmodels"):
        assert (installed / package / "py.typed").exists()
    done = run(installed, tmp_path, sys.executable, "-m", "experiments.list", "configs")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(files.shipped())
    config = "--config=configs/lra/listops.py:mixer=s5"
    done = run(installed, tmp_path, installed / "bin/seqmodels", "describe", config, "--lengths=64")
    assert done.returncode == 0, done.stderr
    assert "classifier of width 128" in done.stdout
    done = run(
        installed,
        tmp_path,
        sys.executable,
        "-c",
        "import seqmodels, experiments.sweep.studies as s; s.STUDIES['mqar']().jobs[0].plain_config(); "
        "print(seqmodels.__file__, seqmodels.__version__)",
    )
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert done.stdout.split() == [str(installed / "seqmodels/__init__.py"), version], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("own", ["layers.py", "layers/__init__.py"])
def test_a_users_own_layers_are_named_before_anything_else(installed, tmp_path, own):
    (tmp_path / own).parent.mkdir(exist_ok=True)
    (tmp_path / own).write_text("import jax\n")
    for words in (["-c", "import seqmodels"], ["-m", "experiments.list", "configs"]):
        done = run(installed, tmp_path, sys.executable, *words)
        assert done.returncode == 1
        said = done.stderr.splitlines()[-1]
        assert said.startswith(
            f"ImportError: {tmp_path / own.removesuffix('/__init__.py')} hides the package `layers`"
        ), said
