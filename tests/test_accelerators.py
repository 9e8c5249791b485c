"""Every accelerator: compiled, parsed strictly into the real protos, and the machine that was asked for."""

import re
from pathlib import Path

import pytest
import yaml
from google.cloud import aiplatform_v1
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from pipelines import cli, pipeline
from pipelines.plan import evaluation
from pipelines.vertex import accelerators
from pipelines.vertex.cluster import Cluster
from pipelines.vertex.images import Images
from trainer.config import Config, replace
from trainer.presets import resolve
from trainer.shared.errors import UserError

REPOSITORY = Path(__file__).parents[1]
CUSTOM_JOB = "europe-west4-docker.pkg.dev/p/sogclr"

# Machine type, accelerator, count, topology, replicas, image: as Google's pages have them.
MACHINES = {
    "cpu": ("n2-standard-16", "ACCELERATOR_TYPE_UNSPECIFIED", 0, "", 1, "cpu"),
    "t4-1": ("n1-standard-8", "NVIDIA_TESLA_T4", 1, "", 1, "gpu"),
    "l4-4": ("g2-standard-48", "NVIDIA_L4", 4, "", 4, "gpu"),
    "a100-8": ("a2-highgpu-8g", "NVIDIA_TESLA_A100", 8, "", 8, "gpu"),
    "h100-8": ("a3-highgpu-8g", "NVIDIA_H100_80GB", 8, "", 8, "gpu"),
    "v2-8": ("cloud-tpu", "TPU_V2", 8, "", 8, "tpu"),
    "v3-8": ("cloud-tpu", "TPU_V3", 8, "", 8, "tpu"),
    "v3-32": ("cloud-tpu", "TPU_V3", 32, "", 32, "tpu"),
    "v4-8": ("cloud-tpu", "TPU_V4_POD", 8, "", 4, "tpu"),
    "v5e-1": ("ct5lp-hightpu-1t", "ACCELERATOR_TYPE_UNSPECIFIED", 0, "1x1", 1, "tpu"),
    "v5e-4": ("ct5lp-hightpu-4t", "ACCELERATOR_TYPE_UNSPECIFIED", 0, "2x2", 4, "tpu"),
    "v5e-8": ("ct5lp-hightpu-8t", "ACCELERATOR_TYPE_UNSPECIFIED", 0, "2x4", 8, "tpu"),
    "v5e-16": ("ct5lp-hightpu-4t", "ACCELERATOR_TYPE_UNSPECIFIED", 0, "4x4", 16, "tpu"),
    "v5e-256": ("ct5lp-hightpu-4t", "ACCELERATOR_TYPE_UNSPECIFIED", 0, "16x16", 256, "tpu"),
}
PLUGIN = {
    "NEXT_PLUGGABLE_DEVICE_USE_C_API": "true",
    "TF_PLUGGABLE_DEVICE_LIBRARY_PATH": "/opt/sogclr/lib/python3.11/site-packages/libtpu/libtpu.so",
}


def compiled(name):
    """Returns the IR as the real proto, and the one worker pool of pretraining."""
    cluster = Cluster(Images(CUSTOM_JOB, "abc"), accelerators.get(name), environment={"MLFLOW_TRACKING_URI": "https://m"})
    proto = json_format.ParseDict(pipeline.compile_pipeline(cluster, {}), pipeline_spec_pb2.PipelineSpec())
    default = proto.components["comp-pretrain"].input_definitions.parameters["worker_pool_specs"].default_value
    (pool,) = json_format.MessageToDict(default)
    parsed = aiplatform_v1.WorkerPoolSpec()
    json_format.ParseDict(pool, aiplatform_v1.WorkerPoolSpec.pb(parsed))
    return proto, parsed


@pytest.mark.thorough
@pytest.mark.parametrize("name", accelerators.ACCELERATORS)
def test_each_accelerator_compiles_into_the_machine_that_it_is(name):
    accelerator = accelerators.get(name)
    _, pool = compiled(name)
    machine = pool.machine_spec
    found = (machine.machine_type, machine.accelerator_type.name, machine.accelerator_count, machine.tpu_topology)
    assert found == MACHINES.get(name, found)[:4]
    assert (accelerator.replicas, accelerator.build) == MACHINES.get(name, (0, 0, 0, 0, accelerator.replicas, accelerator.build))[
        4:
    ]
    assert pool.replica_count == 1
    assert pool.disk_spec.boot_disk_size_gb == 200
    assert pool.container_spec.image_uri == f"{CUSTOM_JOB}/sogclr-{accelerator.build}:abc"
    environ = {variable.name: variable.value for variable in pool.container_spec.env}
    assert environ == {
        "MLFLOW_TRACKING_URI": "https://m",
        "SOGCLR_IMAGE": pool.container_spec.image_uri,
        "SOGCLR_ACCELERATOR": f"{name} {accelerator.build} {accelerator.replicas}",
        **(PLUGIN if accelerator.build == "tpu" else {}),
    }
    # A topology says how many chips there are.
    if machine.tpu_topology:
        rows, columns = map(int, machine.tpu_topology.split("x"))
        assert rows * columns == accelerator.replicas


def test_a_step_is_told_the_accelerator_that_it_must_find():
    """Each its own; a step on any Kubeflow cluster was given none."""
    images = Images(CUSTOM_JOB, "abc")
    spec = pipeline.compile_pipeline(Cluster(images, accelerators.get("v5e-8")), {})
    for component, given in (("pretrain", "v5e-8 tpu 8"), ("linear-eval", "cpu cpu 1")):
        (pool,) = spec["components"][f"comp-{component}"]["inputDefinitions"]["parameters"]["worker_pool_specs"]["defaultValue"]
        assert {"name": "SOGCLR_ACCELERATOR", "value": given} in pool["container_spec"]["env"]
    assert "SOGCLR_ACCELERATOR" not in str(spec["deploymentSpec"])
    assert "'SOGCLR_ACCELERATOR'" not in str(pipeline.compile_pipeline(Cluster(images), {}))


@pytest.mark.parametrize(("name", "told"), [("v2-8", True), ("v3-8", True), ("v5e-8", True), ("l4-1", False), ("cpu", False)])
def test_a_step_on_a_tpu_names_tensorflow_s_plug_in(name, told):
    """Where the container does not show the machine's devices too."""
    cluster = Cluster(Images(CUSTOM_JOB, "abc"), accelerators.get(name), accelerators.get(name))
    spec = pipeline.compile_pipeline(cluster, {})
    for component in ("pretrain", "linear-eval"):
        (pool,) = spec["components"][f"comp-{component}"]["inputDefinitions"]["parameters"]["worker_pool_specs"]["defaultValue"]
        environ = {variable["name"]: variable["value"] for variable in pool["container_spec"]["env"]}
        assert {key: value for key, value in environ.items() if "PLUGGABLE" in key} == (PLUGIN if told else {})
    assert "PLUGGABLE" not in str(spec["deploymentSpec"])


def test_the_plug_in_is_where_the_image_installs_it():
    python, folder = re.search(r"(python3\.\d+) -m venv (\S+)", (REPOSITORY / "Dockerfile").read_text()).groups()
    assert PLUGIN["TF_PLUGGABLE_DEVICE_LIBRARY_PATH"] == f"{folder}/lib/{python}/site-packages/libtpu/libtpu.so"
    assert "libtpu==" in (REPOSITORY / "requirements" / "tpu.lock").read_text()


def test_pretraining_is_a_custom_job_that_finds_its_checkpoints_again_and_starts_again():
    proto, _ = compiled("v5e-8")
    inputs = proto.components["comp-pretrain"].input_definitions.parameters
    launcher = proto.deployment_spec["executors"]["exec-pretrain"]["container"]
    assert launcher["image"].startswith("gcr.io/ml-pipeline/google-cloud-pipeline-components:2.")
    task = proto.components["comp-exit-handler-1"].dag.tasks["pretrain"]
    assert task.inputs.parameters["base_output_directory"].component_input_parameter.endswith("base_output_directory")
    assert inputs["restart_job_on_worker_restart"].default_value.bool_value
    assert task.retry_policy.max_retry_count == 3


@pytest.mark.parametrize("name", ["v5e-8", None])
def test_every_step_is_tried_again_after_a_pause(name):
    """Also the one that closes the MLflow run: a pod may be lost, or the server be away for an hour."""
    cluster = Cluster(Images(CUSTOM_JOB, "abc"), accelerators.get(name) if name else None, retries=5)
    proto = json_format.ParseDict(pipeline.compile_pipeline(cluster, {}), pipeline_spec_pb2.PipelineSpec())
    tasks = {**proto.components["comp-exit-handler-1"].dag.tasks, "end-pipeline": proto.root.dag.tasks["end-pipeline"]}
    assert set(tasks) == {"build-tfrecords", "pretrain", "linear-eval", "record-lineage", "end-pipeline"}
    for task in tasks.values():
        policy = task.retry_policy
        assert (policy.max_retry_count, policy.backoff_duration.seconds, policy.backoff_factor) == (5, 60, 2.0)
        assert policy.backoff_max_duration.seconds == 3600


def test_nothing_of_a_step_is_among_what_a_custom_job_takes_for_itself():
    from google_cloud_pipeline_components.v1.custom_job import CustomTrainingJobOp

    from components.steps import linear_eval, pretrain

    for component in (pretrain, linear_eval):
        assert not set(component.component_spec.inputs) & set(CustomTrainingJobOp.component_spec.inputs)


def test_every_image_is_named_by_commit_or_digest():
    for images, ending in (
        (Images("r", "abc"), ":abc"),
        (Images("r", "abc", {"cpu": "sha256:1", "tpu": "sha256:1"}), "@sha256:1"),
    ):
        spec = pipeline.compile_pipeline(Cluster(images, accelerators.get("v3-8")), {})
        named = re.findall(r"image(?:_uri)?': '([^']+)'", str(spec))
        assert len(named) >= 7
        for image in named:
            assert image.endswith(ending) or re.fullmatch(r"gcr\.io/ml-pipeline/[\w-]+:\d+\.\d+\.\d+", image), image


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("v6e-8", "runs no TensorFlow"),
        ("v5p-8", "runs no TensorFlow"),
        ("tpu7x-8", "runs no TensorFlow"),
        ("v3-7", "there is no v3 of size 7: take v3-8"),
        ("v4-7", "there is no v4 of size 7; sogclr accelerators lists them"),
        ("l4-3", "there is no l4 of size 3: take l4-1 or l4-2 or l4-4 or l4-8"),
        ("a1000-1", "did you mean a100-1"),
        ("", "there is no accelerator"),
    ],
)
def test_what_cannot_be_had_is_refused_with_a_reason(name, named):
    with pytest.raises(UserError, match=re.escape(named)):
        accelerators.get(name)


def test_what_refuses_a_machine_names_one_that_is_not_refused():
    """By its own family, where that has one; never a slice of several hosts or a v4."""
    refused = [one for one in accelerators.ACCELERATORS.values() if one.refused]
    assert {"v3-32", "v3-2048", "v4-8", "v4-512", "v5e-16", "v5e-256"} < {one.name for one in refused}
    assert {one.name for one in refused} == {
        one.name for one in accelerators.ACCELERATORS.values() if one.hosts > 1 or one.name.startswith("v4-")
    }
    for one in refused:
        with pytest.raises(UserError) as raised:
            accelerators.check_usable(one, "--accelerator")
        better = re.search(rf"^--accelerator {one.name} is refused: .*; take (\S+), or --force-accelerator", str(raised.value))[1]
        assert better == {"v3": "v3-8", "v4": "v5e-8", "v5e": "v5e-8"}[one.name.partition("-")[0]]
        accelerators.check_usable(accelerators.get(better), "--accelerator", spot=True)
        accelerators.check_usable(one, "--accelerator", force=True)


def test_no_slice_of_several_hosts_is_spot():
    for name, said in (("v5e-16", "v5e-16 has 4: leave out"), ("v3-32", "v3-32 has 4: leave out")):
        with pytest.raises(UserError, match=said):
            accelerators.check_usable(accelerators.get(name), "--accelerator", spot=True, force=True)


def test_a_better_machine_for_the_evaluation_is_none_that_is_refused(monkeypatch):
    def reckon(demand, accelerator, dollars):
        cheapest = {"v4-8": 1.0, "v5e-16": 2.0, "v5e-8": 3.0}
        return {
            "official": evaluation.ProtocolEstimate(0, 0, 0, hours=1, price=cheapest.get(accelerator.name, 9), bound_by="fit")
        }

    monkeypatch.setattr(evaluation, "estimate_protocols", reckon)
    demand = evaluation.Demand({}, evaluation.Cost(0, 0), "float32", memory_bytes=0, disk_bytes=0)
    assert "take --eval-accelerator v5e-8 (" in evaluation._better_machine(demand, evaluation.Limits())


def compile_with(*options):
    command = ["compile", "--preset", "sogclr_imagenet_r50_b512", "--output", "p.yaml", "--tag", "abc"]
    return cli.main([*command, *options])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--accelerator", "v5e-16"), "--accelerator v5e-16 is refused: each of its 4 hosts would train alone; take v5e-8"),
        (("--accelerator", "v4-8"), "--accelerator v4-8 is refused: Vertex AI lists no v4 for TensorFlow; take v5e-8"),
        (("--accelerator", "v5e-8", "--eval-accelerator", "v3-32"), "--eval-accelerator v3-32 is refused: .* take v3-8"),
        (("--accelerator", "v5e-16", "--spot", "--force-accelerator"), "leave out --spot"),
        (("--accelerator", "v5e-8", "--timeout-hours", "169"), "--timeout-hours 169 is more than 168"),
    ],
)
def test_what_vertex_ai_cannot_run_is_not_compiled(tmp_path, monkeypatch, capsys, options, named):
    monkeypatch.chdir(tmp_path)
    assert compile_with(*options) == 2
    assert re.fullmatch(f"error: [^\n]*{named}[^\n]*\n", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_machine_can_be_forced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compile_with("--accelerator", "v5e-16", "--force-accelerator") == 0
    assert "4x4" in Path("p.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "batch", "near"),
    [("v5e-8", 500, "496 or global_batch_size=504"), ("v3-32", 16, "32"), ("a100-8", 250, "248"), ("v4-8", 510, "508")],
)
def test_a_global_batch_that_does_not_divide_is_refused_with_one_that_does(name, batch, near):
    with pytest.raises(UserError, match=near.split(" ")[0]):
        accelerators.check(accelerators.get(name), replace(Config(), global_batch_size=batch))


def test_every_imagenet_preset_divides_on_every_common_slice():
    for preset in ("sogclr_imagenet_r50_b512", "sogclr_imagenet_s_r50_b256"):
        for name in ("cpu", "a100-8", "v2-8", "v3-8", "v3-32", "v4-32", "v5e-16", "v5e-256"):
            accelerators.check(accelerators.get(name), resolve(preset))


def test_the_table_in_the_docs_is_this_one(capsys):
    assert cli.main(["accelerators"]) == 0
    text = (REPOSITORY / "docs" / "vertex.md").read_text()
    table = re.search(r"^\| name \| machine type .*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)[1]
    rows = []
    for one in accelerators.ACCELERATORS.values():
        topology = one.tpu_topology or "-"
        count = f"{one.accelerator_type} x {one.accelerator_count}" if one.accelerator_type else "-"
        refused = one.refused or "-"
        rows.append(
            f"| {one.name} | {one.machine_type} | {count} | {topology} | {one.replicas} | sogclr-{one.build} | {refused} |"
        )
    assert table.splitlines() == rows
    listed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert all(one.refused in listed[one.name] for one in accelerators.ACCELERATORS.values())
    assert "would train alone" in listed["v5e-16"]
    assert "would train alone" not in listed["v5e-8"]


def test_compiling_for_a_tpu_knows_where_checkpoints_go(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    command = "compile --preset sogclr_imagenet_r50_b512 --accelerator v5e-8 --output p.yaml --tag abc --pipeline-root gs://bkt/r"
    assert cli.main(command.split()) == 0
    spec = yaml.safe_load(Path("p.yaml").read_text())
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert parameters["base_output_directory"]["defaultValue"] == "gs://bkt/r/custom-jobs"
    assert capsys.readouterr().out == "p.yaml\n"
