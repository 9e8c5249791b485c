"""The graph of the pipeline, pipelines of a single step, and their compilation for a cluster.

`_connect` defines the graph once. How a task is made depends on where it runs. On this machine, a task is the plain component.
On a cluster, an exit handler around the tasks closes the MLflow run whether the job succeeds or not. On Vertex AI, pretraining
and the linear eval are custom jobs, each with exactly the requested machine.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from kfp import compiler, dsl

from components.lineage import Artifact
from components.steps import COMPONENTS, IMAGE, end_pipeline, record_lineage
from pipelines.code import step_version
from pipelines.vertex.cluster import Cluster
from pipelines.vertex.containers import with_init, with_one_job_an_attempt
from trainer.shared.errors import UserError
from trainer.shared.files import write_whole

_DESCRIPTION = "Raw images to TFRecords, SogCLR pretraining, linear eval."
_PIPELINE_ACCOUNT = "{{$.pipeline_service_account}}"
"""Vertex AI replaces this with the pipeline's account. Without an account, a custom job would run as Vertex AI's own agent."""


class Outputs(NamedTuple):
    dataset: dsl.Dataset
    model: dsl.Model
    metrics: dsl.Metrics


def _connect(
    make_task: Callable[..., Any],
    beam_args: Sequence[str],
    raw: Any,
    raw_identity: Any,
    preset: Any,
    overrides: Any,
    linear_eval_overrides: Any,
    init_from: Any,
    init_identity: Any,
) -> Outputs:
    """Connects the three steps and returns their outputs.

    `make_task(component, **arguments)` returns the task of a component. `beam_args` are Beam's own options. The other arguments
    are the parameters of `sogclr`.
    """
    built = make_task(
        "build-tfrecords",
        raw=raw,
        raw_identity=raw_identity,
        beam_args=list(beam_args),
        code_version=step_version("build-tfrecords"),
    )
    dataset = built.outputs["dataset"]
    pretrained = make_task(
        "pretrain",
        preset=preset,
        overrides=overrides,
        code_version=step_version("pretrain"),
        dataset=dataset,
        init_from=init_from,
        init_identity=init_identity,
    )
    model = pretrained.outputs["model"]
    evaluated = make_task(
        "linear-eval",
        overrides=linear_eval_overrides,
        code_version=step_version("linear-eval"),
        dataset=dataset,
        model=model,
    )
    return Outputs(dataset, model, evaluated.outputs["metrics"])


def _import_artifacts(inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    types = {kind.schema_title: kind for kind in (dsl.Dataset, dsl.Model)}
    return {
        name: dsl.importer(
            artifact_uri=artifact.uri, artifact_class=types[artifact.type], metadata=dict(artifact.metadata)
        ).output
        for name, artifact in inputs.items()
    }


# ---- On this machine


def _local_task(component: str, **arguments: Any) -> Any:
    return COMPONENTS[component](**arguments)


@dsl.pipeline(name="sogclr", description=_DESCRIPTION)
def sogclr(
    raw: str,
    raw_identity: str,
    preset: str,
    overrides: list[str],
    linear_eval_overrides: list[str],
    init_from: str = "",
    init_identity: str = "",
) -> Outputs:
    """The whole pipeline on this machine.

    Args:
        raw: Folder of the raw archives.
        raw_identity: Part of the cache key. Changes when the archives change; may be empty if no cache is used.
        preset: Name of the experiment.
        overrides: key=value for each changed setting of pretraining.
        linear_eval_overrides: key=value for each changed setting of the linear eval, for example linear_eval.seed=1.
        init_from: Checkpoint of another run, which pretraining starts from; empty for none.
        init_identity: Part of the cache key. Changes when that checkpoint changes.
    """
    return _connect(_local_task, (), raw, raw_identity, preset, overrides, linear_eval_overrides, init_from, init_identity)


def one_step(component: str, arguments: Mapping[str, Any], inputs: Mapping[str, Artifact]) -> dsl.base_component.BaseComponent:
    """Returns a pipeline for this machine that runs `component` alone, on outputs of earlier runs."""

    @dsl.pipeline(name=f"sogclr-{component}")
    def again() -> None:
        _local_task(component, **arguments, **_import_artifacts(inputs))

    return again


# ---- On a cluster


def compile_pipeline(cluster: Cluster, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the whole pipeline as IR, with `defaults` for its parameters, checked by parsing it into KFP's protos.

    Its parameters are those of `sogclr`, and on Vertex AI also `base_output_directory`, the parent folder of checkpoints.
    """

    def connect(*parameters: Any, base_output_directory: Any = "") -> None:
        with dsl.ExitHandler(_end_task(cluster), name="steps"):
            made = _connect(partial(_task, cluster, base_output_directory), cluster.beam_args, *parameters)
            join = record_lineage(job=dsl.PIPELINE_JOB_NAME_PLACEHOLDER, **made._asdict())
            _with_environment(cluster, "record-lineage", join).set_caching_options(False)

    # KFP takes the parameters from a function's signature.
    def plain(
        raw: str,
        raw_identity: str,
        preset: str,
        overrides: list[str],
        linear_eval_overrides: list[str],
        init_from: str = "",
        init_identity: str = "",
    ) -> None:
        connect(raw, raw_identity, preset, overrides, linear_eval_overrides, init_from, init_identity)

    def with_custom_jobs(
        raw: str,
        raw_identity: str,
        preset: str,
        overrides: list[str],
        linear_eval_overrides: list[str],
        base_output_directory: str,
        init_from: str = "",
        init_identity: str = "",
    ) -> None:
        parameters = (raw, raw_identity, preset, overrides, linear_eval_overrides, init_from, init_identity)
        connect(*parameters, base_output_directory=base_output_directory)

    return _compile(cluster, with_custom_jobs if cluster.accelerator else plain, "sogclr", defaults)


def compile_step(
    cluster: Cluster, component: str, arguments: Mapping[str, Any], inputs: Mapping[str, Artifact], base_output_directory: str
) -> dict[str, Any]:
    """Returns a pipeline that runs `component` alone on the outputs of an earlier job, as IR."""

    def again() -> None:
        with dsl.ExitHandler(_end_task(cluster), name="steps"):
            _task(cluster, base_output_directory, component, **arguments, **_import_artifacts(inputs)).set_caching_options(False)

    return _compile(cluster, again, f"sogclr-{component}", {})


def _end_task(cluster: Cluster) -> Any:
    return _with_environment(cluster, "end-pipeline", end_pipeline(job=dsl.PIPELINE_JOB_NAME_PLACEHOLDER)).set_caching_options(
        False
    )


def _task(cluster: Cluster, base_output_directory: Any, component: str, **arguments: Any) -> Any:
    """Returns the task of a component: a custom job if it has a machine of its own, else a plain container."""
    if cluster.accelerator_of(component):
        task = _custom_job(cluster, component)(**arguments, base_output_directory=base_output_directory)
        return _with_retries(cluster, task.set_caching_options(cluster.caching))
    task = _with_environment(cluster, component, COMPONENTS[component](**arguments))
    if component == "build-tfrecords" and cluster.beam_args:
        return task.set_cpu_limit("2").set_memory_limit("8G")
    return task.set_cpu_limit("8").set_memory_limit("32G")


def _with_environment(cluster: Cluster, component: str, task: Any) -> Any:
    for name, value in cluster.environment_of(component).items():
        task.set_env_variable(name, value)
    return _with_retries(cluster, task.set_caching_options(cluster.caching))


def _with_retries(cluster: Cluster, task: Any) -> Any:
    return task.set_retry(cluster.retries, backoff_duration="60s", backoff_factor=2.0, backoff_max_duration="3600s")


def _custom_job(cluster: Cluster, component: str) -> Callable:
    from google_cloud_pipeline_components.v1.custom_job import create_custom_training_job_from_component

    accelerator = cluster.accelerator_of(component)
    assert accelerator is not None
    return create_custom_training_job_from_component(
        COMPONENTS[component],
        display_name=f"sogclr-{component}",
        machine_type=accelerator.machine_type,
        boot_disk_size_gb=cluster.disk_gb,
        timeout=f"{round(cluster.timeout_hours * 3600)}s",
        restart_job_on_worker_restart=True,
        service_account=cluster.service_account or _PIPELINE_ACCOUNT,
        network=cluster.network,
        encryption_spec_key_name=cluster.encryption_key,
        labels=dict(cluster.labels),
        strategy="SPOT" if cluster.spot else "STANDARD",
        env=[{"name": name, "value": value} for name, value in cluster.environment_of(component).items()],
    )


def _compile(cluster: Cluster, function: Callable, name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    pipeline = dsl.pipeline(name=name, description=_DESCRIPTION)(function)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "pipeline.yaml")
        compiler.Compiler().compile(pipeline, str(file), pipeline_parameters=dict(defaults))
        spec: dict[str, Any] = yaml.safe_load(file.read_text())
    for executor in spec["deploymentSpec"]["executors"].values():
        if executor.get("container", {}).get("image") == IMAGE:
            executor["container"]["image"] = cluster.images.reference("cpu")
            executor["container"]["command"] = with_init(executor["container"]["command"])
        elif executor.get("container"):
            executor["container"]["command"] = with_one_job_an_attempt(executor["container"]["command"])
    for key, component in spec["components"].items():
        pools = component.get("inputDefinitions", {}).get("parameters", {}).get("worker_pool_specs")
        if pools:
            # The library's function has no arguments for a TPU's topology and for the image.
            (pool,) = pools["defaultValue"]
            step = key.removeprefix("comp-")
            accelerator = cluster.accelerator_of(step)
            assert accelerator is not None, step
            pool["machine_spec"] = accelerator.machine_spec
            pool["container_spec"]["image_uri"] = cluster.image_of(step)
            pool["container_spec"]["command"] = with_init(pool["container_spec"]["command"])
    check(spec)
    return spec


def check(spec: Mapping[str, Any]) -> None:
    """Checks a compiled pipeline and its machines by parsing them into the protos of KFP and Vertex AI. Raises UserError."""
    from google.cloud import aiplatform_v1
    from google.protobuf import json_format
    from kfp.pipeline_spec import pipeline_spec_pb2

    try:
        parsed = json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
        for component in parsed.components.values():
            parameters = component.input_definitions.parameters
            if "worker_pool_specs" in parameters:
                for pool in json_format.MessageToDict(parameters["worker_pool_specs"].default_value):
                    json_format.ParseDict(pool, aiplatform_v1.WorkerPoolSpec.pb()())
    except json_format.ParseError as error:
        raise UserError(f"Vertex AI would reject the compiled pipeline: {error}") from error


def write(spec: Mapping[str, Any], output: Path) -> None:
    """Writes IR as YAML, atomically."""
    write_whole(str(output), yaml.safe_dump(dict(spec), sort_keys=False).encode())
