"""The container images: what they are made of and how they are built. The slow ones install and build for real."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from vertex import container
from vertex.google import serving
from vertex.image import image_of, layers

from pipelines.vertex.images import Images
from trainer import hardware
from trainer.shared.errors import UserError

REPOSITORY = Path(__file__).parents[1]
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
BUILDS = ("cpu", "gpu", "tpu")
PACKAGE = re.compile(r"^([a-z0-9-]+)==(\S+)", re.MULTILINE)


def locked(name):
    """Every version of each package: those for one Python differ from those for another."""
    found = {}
    for package, version in PACKAGE.findall((REPOSITORY / "requirements" / f"{name}.lock").read_text()):
        found.setdefault(package, set()).add(version)
    return found


def test_all_locks_have_the_same_versions():
    cpu = locked("cpu")
    for name in ("gpu", "tpu", "dev"):
        other = locked(name)
        shared = set(other) & set(cpu)
        assert len(shared) > 100
        assert {package: other[package] for package in shared if not other[package] <= cpu[package]} == {}
    assert locked("tpu")["libtpu"] == locked("tpu-check")["libtpu"] == {"0.0.30"}
    for build, package in {"cpu": "tensorflow-cpu", "gpu": "tensorflow", "tpu": "tensorflow-tpu"}.items():
        assert locked(build)[package] == {"2.20.0"}
        assert not {"pytest", "ruff", "mypy", "gcp-storage-emulator"} & set(locked(build))


@pytest.mark.parametrize("build", BUILDS)
def test_an_image_says_its_commit(build):
    assert image_of(build).environ["SOGCLR_COMMIT"] == "c0ffee"
    assert "org.opencontainers.image.revision" in DOCKERFILE
    assert ":latest" not in DOCKERFILE


@pytest.mark.parametrize("build", BUILDS)
def test_an_image_runs_as_root(build):
    """Root owns Vertex AI's /gcs, Dataflow's /var/opt and a TPU's /dev/vfio."""
    assert image_of(build).user == "root"


def test_the_gpu_image_asks_for_the_gpus_and_finds_the_driver():
    """Google's machines mount NVIDIA's driver at /usr/local/nvidia; NVIDIA's runtime reads the two variables."""
    gpu, cpu, tpu = (image_of(build).environ for build in ("gpu", "cpu", "tpu"))
    assert gpu["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert gpu["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert "/usr/local/nvidia/lib64" in gpu["LD_LIBRARY_PATH"].split(":")
    # There lies nvidia-smi, which trainer/hardware.py asks; the project's own python comes first.
    assert gpu["PATH"].split(":")[:2] == ["/opt/sogclr/bin", "/usr/local/nvidia/bin"]
    for other in (cpu, tpu):
        assert not {"NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "LD_LIBRARY_PATH"} & set(other)


@pytest.fixture
def machine(tmp_path):
    """A machine with the CPU image's files and root's empty /gcs, and none of a container's files from before."""
    if reason := container.possible():
        pytest.skip(reason)
    for name in ("etc", "gcs"):
        (tmp_path / name).mkdir()
    (tmp_path / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\nsogclr:x:1000:1000::/home:/bin/sh\n")
    (tmp_path / "gcs").chmod(0o755)
    return container.Machine(layers(), tmp_path / "etc", tmp_path / "gcs")


def start(machine, image, *command, **environ):
    """Returns the exit status and the output of a command in a container."""
    log = machine.etc.with_name("log")
    log.unlink(missing_ok=True)
    status = container.Container(machine, image, command, environ, log).wait()
    return status, log.read_text()


BOOT = ("--id=1", "--logging_endpoint=localhost:1", "--control_endpoint=localhost:1", "--semi_persist_dir=/var/opt/google")
# In the place of Beam's worker, which would wait for a service.
WORKER = """
import apache_beam.runners.worker.sdk_worker_main as worker, os, sys
print(sys.prefix, os.environ["WORKER_ID"], os.environ["SOGCLR_COMMIT"], bool(worker.main))
import beam_jobs.convert
"""


def boot(machine, image):
    """Starts a Dataflow worker as boot does; the last step prints what it finds."""
    assert image.entrypoint == ["/opt/apache/beam/boot"], "Dataflow gives the entry point options, and no command"
    command = [
        "sh",
        "-c",
        'cp /opt/apache/beam/boot /tmp/boot && sed -i "s|-m apache_beam.*|-c \\"\\$W\\"|" /tmp/boot && exec /tmp/boot "$@"',
    ]
    return start(machine, image, *command, "boot", *BOOT, W=WORKER)


@pytest.mark.cloud
def test_a_worker_of_dataflow_starts_and_finds_the_project(machine):
    status, said = boot(machine, image_of("cpu"))
    assert status == 0, said
    assert "/opt/sogclr 1 c0ffee True" in said


@pytest.mark.cloud
@pytest.mark.parametrize(
    ("user", "default_environment", "fault"),
    [
        ("sogclr", "", "Permission denied: '/opt/apache/beam-venv"),
        ("sogclr", "1", "cannot create directory '/var/opt/google': Permission denied"),
        ("root", "", "No module named pip|not found: apache-beam"),
    ],
)
def test_a_worker_of_dataflow_needs_root_and_the_image_s_own_environment(machine, user, default_environment, fault):
    image = image_of("cpu")
    environ = {**image.environ, "RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT": default_environment}
    status, said = boot(machine, replace(image, user=user, environ=environ))
    assert status != 0
    assert re.search(fault, said), said


@pytest.mark.cloud
@pytest.mark.parametrize(("user", "status"), [("root", 0), ("sogclr", 1)])
def test_a_step_writes_what_kfp_asks_for_to_root_s_gcs(machine, user, status):
    """With the command that stands in a compiled job."""
    task = {"outputs": {"outputFile": "/gcs/bucket/job/executor_output.json"}, "inputs": {}}
    component = "def body() -> None:\n    import components.workspace\n"
    executor = "python3 -m components.ending kfp.dsl.executor_main --component_module_path /tmp/c.py"
    program = f"printf '%s' \"$0\" > /tmp/c.py && exec {executor}"
    arguments = ["--executor_input", json.dumps(task), "--function_to_execute", "body"]
    found, said = start(
        machine, replace(image_of("cpu"), user=user), "sh", "-ec", f'{program} "$@"', component, *arguments, _KFP_RUNTIME="true"
    )
    assert found == status, said
    assert (machine.gcs / "bucket" / "job" / "executor_output.json").is_file() == (user == "root")


@pytest.mark.cloud
def test_a_container_hears_a_signal_however_early_and_ends_with_all_that_it_started(machine):
    """What the rehearsal's kills stand on. PID 1 without a handler hears no SIGTERM, as in any engine."""
    image, log = image_of("cpu"), machine.etc.with_name("log")
    for _ in range(3):
        assert container.Container(machine, image, ["sleep", "600"], {}, log).kill() != 0
    deaf = container.Container(machine, image, ["sleep", "600"], {}, log)
    deaf.signal(signal.SIGTERM)
    assert deaf.poll() is None
    assert deaf.stop(grace=0.0) != 0
    hears = container.Container(machine, image, ["sh", "-c", "trap 'exit 3' TERM; echo ready; sleep 600 & wait"], {}, log)
    while "ready" not in log.read_text():
        assert hears.poll() is None
    assert hears.stop(grace=600) == 3
    hears.signal(signal.SIGTERM)


def test_beam_s_worker_is_of_the_version_that_the_image_has():
    (version,) = locked("cpu")["apache-beam"]
    assert f"beam_python3.11_sdk:{version}" in DOCKERFILE


def test_what_is_copied_is_there_and_nothing_else_is_sent():
    copied = re.findall(r"^COPY (?!--from)([^$\n]+) \S+$", DOCKERFILE, re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert names >= {"trainer", "eval", "beam_jobs", "components", "pipelines", "pyproject.toml"}
    allowed = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert names <= allowed
    assert all((REPOSITORY / name).exists() for name in names)


def test_a_registry_s_digest_is_what_names_an_image():
    with serving() as google:
        repository = f"{google.url.removeprefix('http://')}/p/sogclr"
        google.accounts.images = {f"p/sogclr/sogclr-{build}:abc": f"sha256:{number}" for number, build in enumerate(BUILDS)}
        found = Images(repository, "abc").resolved("token", BUILDS)
        assert [found.reference(build) for build in BUILDS] == [
            f"{repository}/sogclr-{b}@sha256:{n}" for n, b in enumerate(BUILDS)
        ]
        for fault, named in ((404, "make images"), (403, "artifactregistry.reader"), (500, "answers 500"), ("cut", "be reached")):
            google.fail(fault, path="manifests")
            with pytest.raises(UserError, match=named):
                Images(repository, "abc").resolved("token", ("cpu",))


def run(*command, **more):
    done = subprocess.run([str(one) for one in command], capture_output=True, text=True, **more)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def online(folder):
    ask = [shutil.which("uv"), "pip", "install", "--dry-run", "--quiet", "--no-deps", "--target", folder, "libtpu==0.0.30"]
    return subprocess.run(ask, capture_output=True).returncode == 0


@pytest.mark.slow
def test_each_build_replaces_the_one_before_and_imports_where_its_accelerator_is_not(tmp_path):
    if not online(tmp_path / "asked"):
        pytest.skip("no package index")
    env = tmp_path / "env"
    # trainer comes first, as everywhere: where there is no TPU, it keeps libtpu from asking for one for minutes.
    code = "import trainer.train, eval.measure.linear_eval, components.tracking, tensorflow; print(tensorflow.__version__)"
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    for build in ("tpu", "gpu"):
        run(sys._base_executable, REPOSITORY / "requirements" / "install.py", env, build)
        run(env / "bin" / "uv", "pip", "check", "--python", env / "bin" / "python")
        assert run(env / "bin" / "python", "-c", code, cwd=tmp_path, env=environ).strip() == "2.20.0"
        said = subprocess.run([env / "bin" / "sogclr", "doctor", "--json"], cwd=tmp_path, env=environ, capture_output=True).stdout
        found = {one["name"]: one for one in json.loads(said)}
        assert found["lock"]["value"] == f"as in requirements/{build}.lock"
        assert found["TensorFlow"]["value"].startswith(f"2.20.0 for {build}")
        if not hardware.visible():
            assert f"this machine has no {build.upper()}" in found["accelerators that TensorFlow sees"]["wrong"]


@pytest.mark.slow
@pytest.mark.parametrize("build", ["cpu", "tpu"])
def test_the_dockerfile_builds(tmp_path, build):
    """With buildah on a Debian made here, since that needs no registry of images; Beam's worker is a stub."""
    if (
        shutil.which("buildah") is None
        or shutil.which("debootstrap") is None
        or os.geteuid() != 0
        or not online(tmp_path / "asked")
    ):
        pytest.skip("that needs buildah, debootstrap, root and a package index")
    sources = "\n".join(path.read_text() for path in Path("/etc/apt").rglob("*.sources"))
    mirror = re.search(r"^URIs: (\S+)", sources, re.MULTILINE)
    run("debootstrap", "--variant=minbase", "bookworm", tmp_path / "debian", *([mirror[1]] if mirror else []))
    boot = tmp_path / "beam" / "opt" / "apache" / "beam" / "boot"
    boot.parent.mkdir(parents=True)
    boot.write_text("#!/bin/sh\n")
    boot.chmod(0o755)
    buildah = ["buildah", "--root", tmp_path / "store", "--runroot", tmp_path / "runroot"]
    for folder, name in (("debian", "localhost/base:bookworm"), ("beam", "localhost/beam:stub")):
        container = run(*buildah, "from", "scratch").strip()
        run(*buildah, "add", container, tmp_path / folder, "/")
        run(*buildah, "commit", "--quiet", "--rm", container, name)
    # Where packages come through a proxy with a certificate of its own, pip must know that in the build too.
    options = ["--isolation", "chroot", "--network", "host", "--build-arg", "BASE=localhost/base:bookworm"]
    options += [
        "--build-arg",
        "BEAM_SDK=localhost/beam:stub",
        "--build-arg",
        f"BUILD={build}",
        "--build-arg",
        f"COMMIT={'0' * 40}",
    ]
    if bundle := os.environ.get("PIP_CERT"):
        (tmp_path / "pip.conf").write_text("[global]\ncert = /mnt/certificates/bundle.crt\n")
        (tmp_path / "certificates").mkdir()
        shutil.copy(bundle, tmp_path / "certificates" / "bundle.crt")
        options += [
            "--secret",
            f"id=pip,src={tmp_path / 'pip.conf'}",
            "--volume",
            f"{tmp_path / 'certificates'}:/mnt/certificates:ro",
        ]
    run(*buildah, "build", *options, "--tag", "sogclr", REPOSITORY)
    container = run(*buildah, "from", "sogclr").strip()
    code = "import tensorflow, components.steps, beam_jobs.build_tfrecords, pipelines.code; print(pipelines.code.git_commit())"
    inside = [*buildah, "run", "--isolation", "chroot", "--env", "TPU_SKIP_MDS_QUERY=1", container, "--"]
    assert run(*inside, "id", "-un").strip() == "root"
    assert run(*inside, "python3", "-c", code).strip() == "0" * 40
    run(*buildah, "rm", "--all")
