"""tools/environment.py: when it installs, when it does nothing, when it asks for a new environment."""

import importlib.metadata
import importlib.util
import pathlib

import pytest

PATH = pathlib.Path(__file__).resolve().parents[2] / "tools" / "environment.py"


def place(module, old: pathlib.Path, new: pathlib.Path) -> None:
    """Makes the module look at a project in `new` instead of `old`."""
    for name in ("ROOT", "REQUIREMENTS", "VENV", "STAMP", "UNFINISHED"):
        setattr(module, name, new / getattr(module, name).relative_to(old))


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """The module, looking at a project in a temporary folder; `environment.calls` lists what pip was asked."""
    spec = importlib.util.spec_from_file_location("environment", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    place(module, PATH.parents[1], tmp_path / "project")
    module.VENV.mkdir(parents=True)
    module.REQUIREMENTS.write_text("absent==1.0\n")
    (module.ROOT / "pyproject.toml").write_text("[project]\n")
    (module.ROOT / "setup.py").write_text("")
    module.calls = []

    def pip(*arguments):
        module.calls.append(arguments)
        if "--requirement" in arguments:
            monkeypatch.setattr(module, "wrong_packages", lambda look_at_files: [])
        return True

    monkeypatch.setattr(module, "pip", pip)
    return module


def test_installs_once(environment):
    assert environment.install() == environment.READY
    assert len(environment.calls) == 2
    assert environment.install() == environment.READY
    assert len(environment.calls) == 2


@pytest.mark.parametrize("name", ["requirements.txt", "pyproject.toml", "setup.py"])
def test_installs_again_when_a_file_changes(environment, name):
    environment.install()
    with (environment.ROOT / name).open("a") as file:
        file.write("# changed\n")
    environment.calls.clear()
    assert environment.install() == environment.READY
    assert environment.calls


def test_installs_again_when_the_project_moves(environment):
    environment.install()
    environment.calls.clear()
    old = environment.ROOT
    place(environment, old, old.rename(old.with_name("moved")))
    assert environment.install() == environment.READY
    assert len(environment.calls) == 1


def test_a_package_that_is_gone_is_seen(environment, monkeypatch):
    environment.install()
    monkeypatch.setattr(environment, "wrong_packages", lambda look_at_files: ["tqdm"])
    environment.calls.clear()
    environment.install()
    assert any("--requirement" in call for call in environment.calls)


def test_a_failed_install_leaves_no_stamp_and_can_go_on(environment, monkeypatch):
    environment.install()
    (environment.ROOT / "pyproject.toml").write_text("changed")
    works = environment.pip
    monkeypatch.setattr(environment, "pip", lambda *_: False)
    assert environment.install() == environment.FAILED
    assert not environment.STAMP.exists()
    monkeypatch.setattr(environment, "pip", works)
    assert environment.install() == environment.READY


def test_a_killed_install_asks_for_a_new_environment(environment, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    works = environment.pip
    monkeypatch.setattr(environment, "pip", killed)
    with pytest.raises(KeyboardInterrupt):
        environment.install()
    assert not environment.STAMP.exists()
    monkeypatch.setattr(environment, "pip", works)
    assert environment.install() == environment.REBUILD


def test_a_package_that_lacks_files_asks_for_a_new_environment(environment, monkeypatch):
    monkeypatch.setattr(
        environment, "wrong_packages", lambda look_at_files: ["tqdm"] if look_at_files else []
    )
    assert environment.install() == environment.REBUILD
    assert not environment.STAMP.exists()


def test_wrong_packages(environment):
    version = importlib.metadata.version("pytest")
    environment.REQUIREMENTS.write_text(
        f"# a comment\npytest=={version}\nhypothesis==0.0.1  # old\nabsent==1.0\nother==1.0; sys_platform == 'none'\n"
    )
    assert environment.wrong_packages(look_at_files=True) == ["hypothesis", "absent"]


def test_a_package_is_whole_when_its_files_are_there(environment, tmp_path):
    folder = tmp_path / "thing-1.0.dist-info"
    folder.mkdir()
    package = importlib.metadata.Distribution.at(folder)
    assert not environment.is_whole(package)
    (folder / "RECORD").write_text("thing/__init__.py,,\nthing/__pycache__/__init__.cpython-312.pyc,,\n")
    assert not environment.is_whole(package)
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "__init__.py").touch()
    assert environment.is_whole(package)
