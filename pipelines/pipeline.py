"""The graph of the pipeline, pipelines of a single step, and their compilation for a cluster.

`_connect` defines the graph once, whether its encoder is pretrained or imported. How a task is made depends on where it runs. On
this machine, a task is the plain component. On a cluster, an exit handler around the tasks closes the MLflow run whether the job
succeeds or not. On Vertex AI, pretraining and the linear eval are custom jobs, each with exactly the requested machine.
"""

import inspect
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from kfp import compiler, dsl

from components.lineage import NEEDS, Artifact, source_of
from components.steps import COMPONENTS, IMAGE, end_pipeline, record_lineage
from pipelines.code import step_version
from pipelines.vertex.cluster import Cluster
from pipelines.vertex.containers import with_init, with_one_job_an_attempt
from trainer.shared.errors import UserError
from trainer.shared.files import write_whole

_DESCRIPTIONS = {
    "pretrain": "Raw images to TFRecords, SogCLR pretraining, linear eval.",
    "import-encoder": "Raw images to TFRecords, import of an encoder, linear eval.",
}
_PIPELINE_ACCOUNT = "{{$.pipeline_service_account}}"
"""Vertex AI replaces this with the pipeline's account. Without an account, a custom job would run as Vertex AI's own agent."""


_PARAMETERS: dict[str, Any] = {
    "raw": str,
    "raw_identity": str,
    "data_settings": list[str],
    "preset": str,
    "overrides": list[str],
    "linear_eval_overrides": list[str],
}
"""Parameters of every whole pipeline, with their types."""
_OF_SOURCE: dict[str, dict[str, Any]] = {
    "pretrain": {"init_from": "", "init_identity": ""},
    "import-encoder": {"encoder": inspect.Parameter.empty, "encoder_identity": ""},
}
"""Parameters of the component that makes the encoder, with their defaults. All are texts."""


class Outputs(NamedTuple):
    dataset: dsl.Dataset
    model: dsl.Model
    metrics: dsl.Metrics


def _connect(make_task: Callable[..., Any], beam_args: Sequence[str], source: str, given: Mapping[str, Any]) -> Outputs:
    """Connects the three steps and returns their outputs.

    `make_task(component, **arguments)` returns the task of a component. `beam_args` are Beam's own options. `source` is the
    component that makes the encoder, `given` are the pipeline's parameters by name:

    raw: Folder of the raw archives.
    raw_identity: Part of the cache key. Changes when the archives change; may be empty if no cache is used.
    data_settings: key=value for each setting of the conversion that is not the default, for example
        data.subset=imagenet_s. Those of the preset are among them.
    preset: Name of the experiment.
    overrides: key=value for each changed setting of pretraining, or of the views of an imported encoder.
    linear_eval_overrides: key=value for each changed setting of the linear eval, for example linear_eval.seed=1.
    init_from: Checkpoint of another run, which pretraining starts from; empty for none.
    init_identity: Part of the cache key. Changes when that checkpoint changes.
    encoder: Checkpoint of other code, which is imported.
    encoder_identity: Part of the cache key. Changes when that checkpoint changes.
    """
    built = make_task(
        "build-tfrecords",
        raw=given["raw"],
        raw_identity=given["raw_identity"],
        data_settings=given["data_settings"],
        beam_args=list(beam_args),
        code_version=step_version("build-tfrecords"),
    )
    dataset = built.outputs["dataset"]
    made = make_task(
        source,
        preset=given["preset"],
        overrides=given["overrides"],
        code_version=step_version(source),
        **dict.fromkeys(NEEDS[source], dataset),
        **{name: given[name] for name in _OF_SOURCE[source]},
    )
    model = made.outputs["model"]
    evaluated = make_task(
        "linear-eval",
        overrides=given["linear_eval_overrides"],
        code_version=step_version("linear-eval"),
        dataset=dataset,
        model=model,
    )
    return Outputs(dataset, model, evaluated.outputs["metrics"])


def _pipeline(source: str, connect: Callable[[dict[str, Any]], Any], **more: type) -> dsl.base_component.BaseComponent:
    """Returns a whole pipeline. `connect` gets its parameters by name; `more` are further ones.

    KFP takes the parameters from a function's signature, and passes their values in that order.
    """
    types = {**_PARAMETERS, **more}
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=of) for name, of in types.items()]
    for name, default in _OF_SOURCE[source].items():
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=str))

    def whole(*values: Any) -> Any:
        return connect(dict(zip((one.name for one in parameters), values, strict=True)))

    returned = inspect.signature(connect).return_annotation
    whole.__signature__ = inspect.Signature(parameters, return_annotation=returned)  # type: ignore[attr-defined]
    return dsl.pipeline(name="sogclr", description=_DESCRIPTIONS[source])(whole)


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


def run_whole(arguments: Mapping[str, Any]) -> Any:
    """Runs the whole pipeline on this machine and returns its task. `arguments` are its parameters, with or without `encoder`."""
    source = source_of(arguments)

    def connect(given: dict[str, Any]) -> Outputs:
        return _connect(_local_task, (), source, given)

    return _pipeline(source, connect)(**arguments)


def one_step(component: str, arguments: Mapping[str, Any], inputs: Mapping[str, Artifact]) -> dsl.base_component.BaseComponent:
    """Returns a pipeline for this machine that runs `component` alone, on outputs of earlier runs."""

    @dsl.pipeline(name=f"sogclr-{component}")
    def again() -> None:
        _local_task(component, **arguments, **_import_artifacts(inputs))

    return again


# ---- On a cluster


def compile_pipeline(cluster: Cluster, defaults: Mapping[str, Any], source: str = "pretrain") -> dict[str, Any]:
    """Returns the whole pipeline as IR, with `defaults` for its parameters, checked by parsing it into KFP's protos.

    `source` is the component that makes the encoder. The parameters are those of the pipeline on this machine, and on Vertex AI
    also `base_output_directory`, the parent folder of checkpoints.
    """

    def connect(given: dict[str, Any]) -> None:
        folder = given.get("base_output_directory", "")
        with dsl.ExitHandler(_end_task(cluster), name="steps"):
            made = _connect(partial(_task, cluster, folder), cluster.beam_args, source, given)
            join = record_lineage(job=dsl.PIPELINE_JOB_NAME_PLACEHOLDER, **made._asdict())
            _with_environment(cluster, "record-lineage", join).set_caching_options(False)

    more = {"base_output_directory": str} if cluster.accelerator else {}
    return _compile(cluster, _pipeline(source, connect, **more), defaults)


def compile_step(
    cluster: Cluster, component: str, arguments: Mapping[str, Any], inputs: Mapping[str, Artifact], base_output_directory: str
) -> dict[str, Any]:
    """Returns a pipeline that runs `component` alone on the outputs of an earlier job, as IR."""

    @dsl.pipeline(name=f"sogclr-{component}", description=_DESCRIPTIONS["pretrain"])
    def again() -> None:
        with dsl.ExitHandler(_end_task(cluster), name="steps"):
            _task(cluster, base_output_directory, component, **arguments, **_import_artifacts(inputs)).set_caching_options(False)

    return _compile(cluster, again, {})


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


def _compile(cluster: Cluster, pipeline: dsl.base_component.BaseComponent, defaults: Mapping[str, Any]) -> dict[str, Any]:
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
