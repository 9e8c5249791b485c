"""What the operating system shows, the build of TensorFlow that follows, and what `sogclr doctor` and a run make of it.

The system is a folder with a /dev and a /sys of its own; the driver's tool is a script on PATH.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from kfp import dsl
from mlflow import MlflowClient

from components import steps
from pipelines import cli, doctor
from trainer import distribution, hardware
from trainer.distribution import claim_devices, describe_run
from trainer.hardware import Devices, choose_build, visible
from trainer.shared.errors import UserError
from trainer.shared.progress import parse_line

REPOSITORY = Path(__file__).parents[1]
A100 = "NVIDIA A100-SXM4-40GB, 550.54.15"


def pci(system: Path, *devices: tuple[str, str, str]) -> None:
    for number, device in enumerate(devices):
        folder = system / "sys" / "bus" / "pci" / "devices" / f"0000:00:{number:02x}.0"
        folder.mkdir(parents=True)
        for name, value in zip(("vendor", "device", "class"), device, strict=True):
            (folder / name).write_text(f"{value}\n")


def node(system: Path, name: str) -> None:
    path = system / "dev" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def driver(monkeypatch, folder: Path, *lines: str, code: int = 0) -> None:
    """Puts an nvidia-smi on PATH that says `lines`, and nothing else is there."""
    folder.mkdir(exist_ok=True)
    if lines:
        said = "".join(f"echo '{line}'\n" for line in lines)
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{said}exit {code}\n")
        (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A machine with a network card and no accelerator."""
    driver(monkeypatch, tmp_path / "bin")
    pci(tmp_path / "system", ("0x1af4", "0x1041", "0x020000"))
    return tmp_path / "system"


def test_a_machine_without_accelerators_gets_tensorflow_for_the_cpu(system):
    assert visible(system) == []
    assert choose_build([]) == ("cpu", "no NVIDIA driver answers and no TPU is visible")


def test_gpus_are_those_that_the_driver_names(system, tmp_path, monkeypatch):
    driver(monkeypatch, tmp_path / "bin", A100, A100)
    found = visible(system)
    assert found == [Devices("gpu", "2 x NVIDIA A100-SXM4-40GB", "NVIDIA driver 550.54.15 answers")]
    assert choose_build(found) == ("gpu", "2 x NVIDIA A100-SXM4-40GB: NVIDIA driver 550.54.15 answers")


@pytest.mark.parametrize(("said", "code"), [("No devices were found", 6), ("NVIDIA-SMI has failed because it couldn't", 9)])
def test_a_gpu_whose_driver_does_not_answer_is_named_and_not_used(system, tmp_path, monkeypatch, said, code):
    pci(tmp_path / "other", ("0x10de", "0x2330", "0x030200"), ("0x10de", "0x22a3", "0x068000"))
    for lines, problem in (((), "no NVIDIA driver answers: install one"), ((said.replace("'", ""),), "nvidia-smi says: N")):
        driver(monkeypatch, tmp_path / "bin", *lines, code=code)
        (gpu,) = visible(tmp_path / "other")
        assert (gpu.build, gpu.name) == ("gpu", "1 x NVIDIA GPU")
        assert problem in gpu.problem
        build, reason = choose_build([gpu])
        assert build == "cpu"
        assert problem in reason


def test_a_driver_that_is_too_old_is_named_and_not_used(system, tmp_path, monkeypatch):
    driver(monkeypatch, tmp_path / "bin", "Tesla V100-SXM2-16GB, 470.256.02")
    (gpu,) = visible(system)
    assert gpu.problem.startswith("NVIDIA driver 470.256.02 is older than 525.60, which")
    assert choose_build([gpu])[0] == "cpu"


def test_a_driver_without_a_gpu_is_no_gpu(system, tmp_path, monkeypatch):
    driver(monkeypatch, tmp_path / "bin", "No devices were found", code=6)
    assert visible(system) == []


@pytest.mark.parametrize(
    ("device", "nodes", "name"),
    [
        ("0x0027", ["accel0", "accel1"], "TPU v2 or v3"),
        ("0x005e", ["accel0", "accel1"], "TPU v4"),
        ("0x0063", ["vfio/0", "vfio/1", "vfio/vfio"], "TPU v5e"),
    ],
)
def test_tpus_are_those_on_the_bus_with_nodes_that_can_be_opened(system, tmp_path, device, nodes, name):
    vm = tmp_path / "vm"
    pci(vm, ("0x1ae0", device, "0x0b4000"), ("0x1ae0", device, "0x0b4000"), ("0x1ae0", "0x0042", "0x020000"))
    (found,) = visible(vm)
    assert (found.name, found.problem) == (
        f"2 x {name}",
        "it has no node in /dev: start the container with --privileged",
    )
    for one in nodes:
        node(vm, one)
    (found,) = visible(vm)
    assert (found.build, found.name, found.problem) == ("tpu", f"2 x {name}", "")
    assert choose_build([found])[0] == "tpu"


def test_a_tpu_that_only_root_may_open_is_said(system, tmp_path, monkeypatch):
    vm = tmp_path / "vm"
    pci(vm, ("0x1ae0", "0x0063", "0x0b4000"))
    node(vm, "vfio/0")
    # Root, whom the tests may run as, may open anything.
    monkeypatch.setattr(hardware.os, "access", lambda path, mode: False)
    (found,) = visible(vm)
    assert found.problem == f"this user may not open {vm}/dev/vfio/0: run as root"


def test_devices_lent_to_virtual_machines_and_linux_own_accelerators_are_no_tpus(system):
    node(system, "vfio/0")
    node(system, "accel/accel0")
    assert visible(system) == []


def test_a_tpu_comes_before_a_gpu(system, tmp_path, monkeypatch):
    driver(monkeypatch, tmp_path / "bin", A100)
    node(system, "accel0")
    assert [one.build for one in visible(system)] == ["tpu", "gpu"]
    assert choose_build(visible(system))[0] == "tpu"


def test_the_command_of_make_setup_needs_no_package():
    """Without site-packages, as before an installation."""
    command = [sys.executable, "-S", "-m", "trainer.hardware"]
    build, reason = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()
    assert build in hardware.BUILDS
    assert reason


@pytest.mark.parametrize(
    ("device", "nodes"),
    [("0x0027", "accel0"), ("0x005e", "accel0"), ("0x0063", "vfio/0"), ("", "accel0")],
    ids=["v2 or v3", "v4", "v5e", "a TPU that the PCI bus does not show"],
)
def test_tensorflow_is_told_of_the_plug_in_of_every_tpu(tmp_path, monkeypatch, device, nodes):
    vm = tmp_path / "vm"
    (tmp_path / "libtpu").mkdir()
    (tmp_path / "libtpu" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    if device:
        pci(vm, ("0x1ae0", device, "0x0b4000"))
    node(vm, nodes)
    environment = hardware.tensorflow_environment(vm)
    assert environment["NEXT_PLUGGABLE_DEVICE_USE_C_API"] == "true"
    assert environment["TF_PLUGGABLE_DEVICE_LIBRARY_PATH"] == f"{tmp_path}/libtpu/libtpu.so"
    assert "TPU_SKIP_MDS_QUERY" not in environment


def test_tensorflow_is_told_of_no_plug_in_where_there_is_no_tpu(system):
    environment = hardware.tensorflow_environment(system)
    assert environment["TPU_SKIP_MDS_QUERY"] == "1"
    assert not [name for name in environment if "PLUGGABLE" in name]


# ---- doctor


GPU = Devices("gpu", "1 x NVIDIA L4", "NVIDIA driver 550.54.15 answers")
GPUS = Devices("gpu", "2 x NVIDIA L4", "NVIDIA driver 550.54.15 answers")
BROKEN = Devices("gpu", "1 x NVIDIA GPU", "PCI bus", "no NVIDIA driver answers: install one")
TPU = Devices("tpu", "8 x TPU v5e", "/dev/vfio/0 is there")


def found_with(monkeypatch, shown: list[Devices], build: str, **devices: list[str]) -> dict[str, doctor.Finding]:
    """What doctor finds on a machine that shows `shown`, with TensorFlow for `build`, which sees `devices`."""
    monkeypatch.setattr(hardware, "installed_build", lambda: (build, ""))
    monkeypatch.setattr(hardware, "visible", lambda: shown)
    answer = {"version": "2.20.0", "onednn": True, "devices": {"CPU": ["CPU"], **devices}}
    monkeypatch.setattr(doctor, "tensorflow_devices", lambda: answer)
    return {one.name: one for one in doctor.examine(Path("runs"), "sqlite:///nowhere.db", "sogclr", {})}


@pytest.mark.parametrize(
    ("shown", "build", "devices", "said", "wrong"),
    [
        ([], "cpu", {}, "none", ""),
        ([GPU], "gpu", {"GPU": ["NVIDIA L4"]}, "1 x NVIDIA L4", ""),
        ([TPU], "tpu", {"TPU": ["TPU"] * 8}, "8 x TPU", ""),
        ([], "gpu", {}, "none", "this machine has no GPU"),
        ([GPU], "cpu", {}, "none", "make setup TENSORFLOW=gpu"),
        ([TPU], "gpu", {}, "none", "make setup TENSORFLOW=tpu"),
        ([GPU], "gpu", {}, "none", "unset LD_LIBRARY_PATH"),
        ([TPU], "tpu", {}, "none", "another process may hold them"),
    ],
)
def test_doctor_says_what_tensorflow_does_not_see_and_what_to_do(monkeypatch, shown, build, devices, said, wrong):
    found = found_with(monkeypatch, shown, build, **devices)["accelerators that TensorFlow sees"]
    assert found.value == said
    assert wrong in found.wrong
    assert bool(wrong) == bool(found.wrong)


def test_doctor_names_what_differs_from_the_lock(monkeypatch):
    version = doctor._version
    changed = {"numpy": "1.0", "pillow": ""}
    monkeypatch.setattr(doctor, "_version", lambda name: changed.get(name, version(name)))
    found = doctor._against_lock("cpu")
    assert found.wrong.startswith("numpy 1.0, not ==")
    assert "pillow missing, not ==" in found.wrong
    assert found.wrong.endswith(f": remove {sys.prefix}, then make setup TENSORFLOW=cpu installs the locked versions")


@pytest.mark.parametrize("command", [["-c", "import os; os.abort()"], ["-c", "raise SystemExit('libcuda is not here')"]])
def test_doctor_outlives_a_tensorflow_that_does_not_import(monkeypatch, command):
    run = subprocess.run
    monkeypatch.setattr(doctor.subprocess, "run", lambda _, **keywords: run([sys.executable, *command], **keywords))
    assert "importing TensorFlow exits with" in doctor.tensorflow_devices()["error"]


def test_doctor_says_whether_credentials_are_there_and_never_what_they_are(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "_devices", lambda *_: iter(()))
    for name in doctor._CREDENTIALS:
        monkeypatch.setenv(name, f"planted-{name}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:planted-password@127.0.0.1:9")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    assert cli.main(["doctor"]) == 2
    said = capsys.readouterr()
    assert "planted" not in said.out + said.err
    assert "! MLflow: MLflow cannot use http://127.0.0.1:9" in said.out
    assert f"! Google Cloud's credentials: {tmp_path}/key.json cannot be read" in said.out
    assert "MLFLOW_TRACKING_PASSWORD" in said.out
    assert os.listdir(tmp_path) == []


@pytest.mark.thorough
def test_doctor_finds_nothing_wrong_with_the_environment_of_the_tests(tmp_path, monkeypatch, capsys):
    """With TensorFlow itself, in the process that doctor starts."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    cli.main(["doctor"])
    said = capsys.readouterr().out
    assert "  lock: as in requirements/" in said
    assert "TensorFlow: 2.20.0 for " in said
    assert os.listdir(tmp_path) == []


# ---- What a run says of its devices


@pytest.mark.parametrize(
    ("shown", "build", "used", "environ", "said"),
    [
        ([], "cpu", {}, {}, ""),
        ([GPU], "gpu", {"gpu": 1}, {"CUDA_VISIBLE_DEVICES": "0"}, ""),
        ([GPU], "cpu", {}, {}, "shows 1 x NVIDIA L4, but TensorFlow for cpu cannot use it: make setup TENSORFLOW=gpu, or use"),
        ([GPU], "gpu", {}, {}, "CUDA's libraries do not load: unset LD_LIBRARY_PATH"),
        ([GPU], "gpu", {}, {"CUDA_VISIBLE_DEVICES": "0"}, "CUDA's libraries do not load"),
        ([GPU], "gpu", {}, {"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}, "CUDA's libraries do not load"),
        ([GPU], "gpu", {}, {"CUDA_VISIBLE_DEVICES": ""}, 'CUDA_VISIBLE_DEVICES="" hides it: unset it'),
        ([GPU], "gpu", {}, {"CUDA_VISIBLE_DEVICES": "-1"}, 'CUDA_VISIBLE_DEVICES="-1" hides it: unset it'),
        ([GPU], "cpu", {}, {"CUDA_VISIBLE_DEVICES": "1"}, 'CUDA_VISIBLE_DEVICES="1" hides it: unset it'),
        ([GPUS], "gpu", {"gpu": 1}, {"CUDA_VISIBLE_DEVICES": "1"}, '1 of 2 x NVIDIA L4: CUDA_VISIBLE_DEVICES="1" hides'),
        ([GPUS], "gpu", {"gpu": 1}, {}, "uses 1 of 2 x NVIDIA L4: TF_CPP_MIN_LOG_LEVEL=0 shows"),
        ([BROKEN], "gpu", {}, {}, "shows 1 x NVIDIA GPU, but no NVIDIA driver answers: install one"),
        ([TPU], "cpu", {}, {}, "shows 8 x TPU v5e, but TensorFlow for cpu cannot use them: make setup TENSORFLOW=tpu"),
        ([TPU], "tpu", {}, {}, "another process may hold them"),
        ([TPU], "tpu", {"tpu": 4}, {"TPU_VISIBLE_DEVICES": "0,1,2,3"}, 'TPU_VISIBLE_DEVICES="0,1,2,3" hides the rest'),
        ([TPU, GPU], "tpu", {"tpu": 8}, {}, ""),
        ([TPU, GPU], "gpu", {"gpu": 1}, {}, "TensorFlow for gpu cannot use them: make setup TENSORFLOW=tpu"),
        ([TPU, GPU], "cpu", {}, {}, "TENSORFLOW=gpu"),
    ],
)
def test_an_accelerator_that_tensorflow_leaves_unused_is_one_line_with_its_cure(shown, build, used, environ, said):
    line = hardware.why_unused(shown, build, used, environ)
    assert said in line
    assert bool(said) == bool(line)
    assert "\n" not in line


def test_the_processors_are_named(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text("processor\t: 0\nmodel name\t: AMD EPYC 7B13\n")
    assert re.fullmatch(r"\d+ CPU cores? \(AMD EPYC 7B13\)", hardware.processors(tmp_path))
    assert re.fullmatch(r"\d+ CPU cores? \(.+\)", hardware.processors(tmp_path / "nothing"))


@pytest.fixture
def machine(monkeypatch, tmp_path, system):
    """Makes this a machine where TensorFlow for `build` sees `devices`. Its /dev and /sys are in the folder `machine.system`."""

    def make(build: str, **devices: int) -> None:
        monkeypatch.setattr(hardware, "installed_build", lambda: (build, ""))
        seen = {kind: [SimpleNamespace(device_type=kind)] * count for kind, count in devices.items()}
        monkeypatch.setattr(distribution.tf.config, "list_physical_devices", lambda kind: seen.get(kind, []))
        monkeypatch.setattr(distribution.tf.config.experimental, "get_device_details", lambda _: {"device_name": "NVIDIA L4"})
        strategy = SimpleNamespace(num_replicas_in_sync=max([1, *devices.values()]))
        monkeypatch.setattr(distribution, "make_strategy", lambda: strategy)

    make.system, make.bin = tmp_path / "vm", tmp_path / "bin"
    for function in (hardware.visible, hardware.tpus):
        monkeypatch.setattr(function, "__defaults__", (make.system,))
    for name in ("TPU_NAME", "TPU_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return make


def v5e(system: Path, chips: int = 8) -> None:
    pci(system, *[("0x1ae0", "0x0063", "0x0b4000")] * chips)
    for chip in range(chips):
        node(system, f"vfio/{chip}")


def test_a_run_says_first_what_it_runs_on(machine, monkeypatch, capsys):
    machine("cpu")
    claim_devices()
    (line,) = capsys.readouterr().err.splitlines()
    version = distribution.tf.__version__
    assert line == f"running on {hardware.processors()}, TensorFlow {version} for cpu, 1 replica"

    machine("gpu", GPU=2)
    driver(monkeypatch, machine.bin, "NVIDIA L4, 550.54.15", "NVIDIA L4, 550.54.15")
    strategy = claim_devices()
    assert capsys.readouterr().err == f"running on 2 x NVIDIA L4, TensorFlow {version} for gpu, 2 replicas\n"
    assert describe_run(strategy) == {"device": "2 x NVIDIA L4", "tensorflow": f"{version} for gpu", "replicas": "2"}

    machine("tpu", TPU=8)
    v5e(machine.system)
    claim_devices("v5e-8 tpu 8")
    assert capsys.readouterr().err == f"running on 8 x TPU v5e, TensorFlow {version} for tpu, 8 replicas\n"


def test_an_accelerator_that_a_run_on_ones_own_machine_does_not_use_is_a_warning(machine, monkeypatch, capsys):
    machine("cpu")
    v5e(machine.system)
    driver(monkeypatch, machine.bin, A100)
    for given in ("", "cpu cpu 1"):
        claim_devices(given)
        running, warning = capsys.readouterr().err.splitlines()
        assert "CPU core" in running
        assert warning.startswith("warning: the system shows 8 x TPU v5e, but TensorFlow for cpu cannot use them: make setup")
        assert "; the system shows 1 x NVIDIA A100-SXM4-40GB, but" in warning


def test_an_accelerator_that_a_variable_hides_is_a_warning_that_names_it(machine, monkeypatch, capsys):
    machine("gpu")
    driver(monkeypatch, machine.bin, A100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    claim_devices()
    _, warning = capsys.readouterr().err.splitlines()
    assert 'CUDA_VISIBLE_DEVICES="-1" hides it: unset it' in warning


@pytest.mark.parametrize(
    ("build", "devices", "shown", "given", "said"),
    [
        ("cpu", {}, "gpu", "a100-1 gpu 1", "given a100-1, 1 x GPU, and TensorFlow has none: the system shows 1 x NVIDIA A100"),
        ("cpu", {}, "gpu", "a100-1 gpu 1", "TensorFlow for cpu cannot use it: make setup TENSORFLOW=gpu, or use the image"),
        ("gpu", {}, "gpu", "a100-1 gpu 1", "CUDA's libraries do not load"),
        ("gpu", {}, "", "a100-8 gpu 8", "the system shows no GPU; run the job on a machine with a100-8, and its container with"),
        ("gpu", {"GPU": 1}, "gpu", "v5e-8 tpu 8", "8 x TPU, and TensorFlow has none: the system shows no TPU"),
        ("gpu", {"GPU": 1}, "gpu", "a100-2 gpu 2", "2 x GPU, and TensorFlow has 1: run the job on a machine with a100-2"),
        ("tpu", {}, "bus", "v5e-8 tpu 8", "but it has no node in /dev: start the container with --privileged"),
        ("tpu", {}, "", "v5e-8 tpu 8", "the system shows no TPU; run the job on a machine with v5e-8"),
        ("tpu", {"TPU": 4}, "tpu", "v5e-8 tpu 8", "given v5e-8, 8 x TPU, and TensorFlow has 4: TensorFlow uses 4 of 8 x TPU v5e"),
        ("tpu", {"TPU": 8}, "tpu", "v5e-4 tpu 4", "4 x TPU, and TensorFlow has 8: run the job on a machine with v5e-4"),
        ("cpu", {}, "", "v5e-8", "is not an accelerator of a job: write NAME BUILD REPLICAS"),
        ("cpu", {}, "", "v5e-8 npu 8", "is not an accelerator of a job"),
        ("cpu", {}, "", "v5e-8 tpu many", "is not an accelerator of a job"),
    ],
)
def test_a_job_whose_accelerator_tensorflow_has_not_got_fails(machine, monkeypatch, capsys, build, devices, shown, given, said):
    machine(build, **devices)
    if shown == "gpu":
        driver(monkeypatch, machine.bin, A100)
    elif shown == "tpu":
        v5e(machine.system)
    elif shown == "bus":
        pci(machine.system, ("0x1ae0", "0x0063", "0x0b4000"))
    with pytest.raises(UserError) as refused:
        claim_devices(given)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "cure"), [("", "end the process that holds it"), ("mine", "TPU_NAME=mine names it: correct or")]
)
def test_a_tpu_that_does_not_start_is_one_line(machine, monkeypatch, name, cure):
    machine("tpu", TPU=8)
    if name:
        monkeypatch.setenv("TPU_NAME", name)

    def fail():
        raise distribution.tf.errors.UnavailableError(None, None, "The TPU is already in use by process 4711\nand more")

    monkeypatch.setattr(distribution, "make_strategy", fail)
    with pytest.raises(UserError, match=f"cannot start the TPU .The TPU is already in use by process 4711.: {cure}"):
        claim_devices()


def test_a_job_that_has_its_accelerator_does_not_wait_for_the_driver(machine, monkeypatch):
    machine("gpu", GPU=2)
    monkeypatch.setattr(hardware, "visible", lambda: pytest.fail("the driver was asked"))
    claim_devices("l4-2 gpu 2")


@pytest.mark.thorough
@pytest.mark.parametrize("task", ["trainer.task", "eval.task"])
def test_the_command_of_a_job_says_it_before_it_reads_anything(tmp_path, task):
    """The driver shows a GPU, and a variable hides it from TensorFlow, whatever its build."""
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{A100}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "-1"}
    given = ["--preset", "demo", "--checkpoint-dir"] if task == "trainer.task" else ["--checkpoint", "/nowhere", "--output"]
    command = [sys.executable, "-m", task, "--data", "/nowhere", *given, tmp_path / "out"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environ, capture_output=True, text=True)
    running, warning, error = (line for line in done.stderr.splitlines() if not parse_line(line))
    job = {"trainer.task": "pretrain", "eval.task": "linear-eval"}[task]
    assert running.startswith(f"[{job}] running on ")
    assert f"[{job}] warning: " in warning
    assert 'the system shows 1 x NVIDIA A100-SXM4-40GB, but CUDA_VISIBLE_DEVICES="-1" hides it: unset it' in warning
    assert error.startswith("error: /nowhere holds no ")
    assert done.returncode == 2


@pytest.mark.parametrize("component", ["pretrain", "linear_eval"])
def test_a_step_without_its_accelerator_fails_before_it_reads_anything_and_mlflow_says_why(
    machine, monkeypatch, tmp_path, component
):
    machine("tpu")
    monkeypatch.chdir(tmp_path)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.setenv("SOGCLR_ACCELERATOR", "v5e-8 tpu 8")
    # An artifact without metadata would end the step with a KeyError as soon as it is used.
    kinds = {"dataset": dsl.Dataset, "model": dsl.Model, "metrics": dsl.Metrics, "report": dsl.HTML}
    one = {name: kind(name=name, uri=f"{tmp_path}/job/task/{name}", metadata={}) for name, kind in kinds.items()}
    of_pretraining = {"preset": "demo", "init_from": "", "init_identity": ""}
    arguments = of_pretraining if component == "pretrain" else {name: one[name] for name in ("metrics", "report")}
    body = getattr(steps, component).python_func
    with pytest.raises(UserError, match="this job was given v5e-8, 8 x TPU, and TensorFlow has none"):
        body(overrides=[], code_version="0", dataset=one["dataset"], model=one["model"], **arguments)
    (run,) = MlflowClient(store).search_runs(["1"], f"attributes.run_name = '{component.replace('_', '-')}'")
    assert run.info.status == "FAILED"
    assert run.data.tags["sogclr.error"].startswith("this job was given v5e-8")
    assert run.data.tags["sogclr.user_error"] == "true"
