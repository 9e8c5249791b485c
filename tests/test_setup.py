"""`make setup`: which environment it makes, and what becomes of the one before. What is installed is a marker here."""

import importlib.util
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.hardware import Devices

REPOSITORY = Path(__file__).parents[1]
GPU = Devices("gpu", "1 x NVIDIA L4", "NVIDIA driver 550.54.15 answers")


@pytest.fixture
def setup(monkeypatch, tmp_path):
    """requirements/install.py, on a machine without accelerators, with locks of its own; `installed` is what it installed."""
    spec = importlib.util.spec_from_file_location("setup_under_test", REPOSITORY / "requirements" / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "requirements").mkdir()
    for name in (
        "requirements/cpu.lock",
        "requirements/gpu.lock",
        "requirements/tpu.lock",
        "requirements/dev.lock",
        "pyproject.toml",
    ):
        (tmp_path / name).write_text(name)
    module.installed = []

    def install(venv: Path, locks: list[Path]) -> None:
        venv.mkdir()
        (venv / "content").write_text(locks[0].stem)
        module.installed.append(locks[0].stem)

    monkeypatch.setattr(module, "PROJECT", tmp_path)
    monkeypatch.setattr(module, "LOCKS", tmp_path / "requirements")
    monkeypatch.setattr(module, "install", install)
    monkeypatch.setattr(module.hardware, "visible", lambda: [])
    monkeypatch.setattr(module.platform, "system", lambda: "Linux")
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    return module


def test_it_installs_once_what_the_machine_can_use_and_says_why(setup, tmp_path, monkeypatch):
    said = f".venv: Python {platform.python_version()}, TensorFlow for cpu (no NVIDIA driver answers and no TPU is visible)"
    assert [setup.main(tmp_path / ".venv", "") for _ in range(2)] == [said] * 2
    assert setup.installed == ["cpu"]
    monkeypatch.setattr(setup.hardware, "visible", lambda: [GPU])
    assert "for gpu (1 x NVIDIA L4: NVIDIA driver 550.54.15 answers)" in setup.main(tmp_path / "other", "")


def test_another_build_replaces_the_first_and_stays_until_one_is_named(setup, tmp_path):
    venv = tmp_path / ".venv"
    setup.main(venv, "")
    (venv / "left over").touch()
    assert "for gpu (TENSORFLOW=gpu; no NVIDIA driver answers" in setup.main(venv, "gpu")
    assert "for gpu (as installed before; " in setup.main(venv, "")
    assert "make setup TENSORFLOW=cpu changes it" in setup.main(venv, "")
    assert setup.installed == ["cpu", "gpu"]
    assert {path.name for path in venv.iterdir()} == {"content", "installed.json"}


@pytest.mark.parametrize("changed", ["lock", "python", "folder"])
def test_an_environment_of_another_lock_python_or_folder_is_made_anew(setup, tmp_path, monkeypatch, changed):
    venv = tmp_path / ".venv"
    setup.main(venv, "")
    if changed == "lock":
        (tmp_path / "requirements" / "dev.lock").write_text("newer")
    elif changed == "python":
        monkeypatch.setattr(setup.platform, "python_version", lambda: "3.13.9")
    else:
        venv.rename(tmp_path / "moved")
        venv = tmp_path / "moved"
    setup.main(venv, "")
    assert setup.installed == ["cpu", "cpu"]


@pytest.mark.parametrize("error", [SystemExit("error: no network"), KeyboardInterrupt()])
def test_the_environment_before_stays_where_the_new_one_cannot_be_made(setup, tmp_path, monkeypatch, error):
    venv = tmp_path / ".venv"
    setup.main(venv, "")

    def fail(venv: Path, locks: list[Path]) -> None:
        venv.mkdir()
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(setup, "install", fail)
        with pytest.raises(type(error)):
            setup.main(venv, "gpu")
    assert (venv / "content").read_text() == "cpu"
    assert [path.name for path in tmp_path.glob(".venv*")] == [".venv"]
    assert "for cpu" in setup.main(venv, "")
    assert setup.installed == ["cpu"]


def test_an_installation_that_was_killed_gives_way_to_the_environment_before(setup, tmp_path):
    venv = tmp_path / ".venv"
    setup.main(venv, "")
    venv.rename(tmp_path / ".venv.before")
    venv.mkdir()
    (venv / "half").touch()
    assert "for cpu" in setup.main(venv, "")
    assert (venv / "content").read_text() == "cpu"
    assert setup.installed == ["cpu"]


def test_what_cannot_be_installed_is_one_line(setup, tmp_path, monkeypatch):
    for system, machine, asked, said in (
        ("Linux", "x86_64", "cuda", "TENSORFLOW=cuda is no build of TensorFlow: take cpu, gpu, tpu"),
        ("Darwin", "arm64", "gpu", "TensorFlow for gpu exists for Linux only"),
        ("Linux", "aarch64", "", "none for Linux on aarch64"),
    ):
        monkeypatch.setattr(setup.platform, "system", lambda system=system: system)
        monkeypatch.setattr(setup.platform, "machine", lambda machine=machine: machine)
        with pytest.raises(SystemExit, match=said) as ended:
            setup.main(tmp_path / ".venv", asked)
        assert str(ended.value).startswith("error: ")
    assert not (tmp_path / ".venv").exists()


def test_the_environment_of_the_tests_is_one_that_it_made():
    """Unless they run elsewhere, as in an environment of somebody's own."""
    made = Path(sys.prefix) / "installed.json"
    if not made.exists():
        pytest.skip("make setup did not make this environment")
    assert json.loads(made.read_text())["python"] == platform.python_version()
    compiled = subprocess.run(
        [sys.executable, "-c", "import numpy, os; print(os.path.exists(numpy.__cached__))"], capture_output=True, text=True
    )
    assert compiled.stdout == "True\n"
