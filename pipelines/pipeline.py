"""The DAG, one step of it alone, and its compilation for a cluster.

On this machine the DAG is run as it is. On a cluster it stands within an exit handler that closes the MLflow run however the
job ends, and on Vertex AI pretraining and the linear eval are custom jobs, each with exactly the machine that was asked for.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from kfp import compiler, dsl

from components import variables
from components.lineage import Artifact
from components.steps import COMPONENTS, IMAGE, build_tfrecords, end_pipeline, linear_eval, pretrain, record_lineage
from pipelines import accelerators
from pipelines.accelerators import Accelerator, Build
from pipelines.code import step_version
from pipelines.containers import with_init, with_one_job_an_attempt
from pipelines.images import Images
from trainer.hardware import plugin_environment
from trainer.shared.errors import UserError
from trainer.shared.files import write_whole


class Outputs(NamedTuple):
    dataset: dsl.Dataset
    model: dsl.Model
    metrics: dsl.Metrics


@dsl.pipeline(name="sogclr", description="Raw images to TFRecords, SogCLR pretraining, linear eval.")
def sogclr(raw: str, raw_identity: str, preset: str, overrides: list[str], linear_eval_overrides: list[str]) -> Outputs:
    """The whole pipeline, as it runs on this machine.

    Args:
        raw: Folder of the raw archives.
        raw_identity: Changes when the archives do; may be empty where nothing is taken from a cache.
        preset: The experiment.
        overrides: key=value for pretraining.
        linear_eval_overrides: key=value for the linear eval, as in linear_eval.seed=1.
    """
    built = build_tfrecords(raw=raw, raw_identity=raw_identity, beam_args=[], code_version=step_version("build-tfrecords"))
    dataset = built.outputs["dataset"]
    pretrained = pretrain(preset=preset, overrides=overrides, code_version=step_version("pretrain"), dataset=dataset)
    model = pretrained.outputs["model"]
    evaluated = linear_eval(
        overrides=linear_eval_overrides, code_version=step_version("linear-eval"), dataset=dataset, model=model
    )
    return Outputs(dataset, model, evaluated.outputs["metrics"])


def one_step(component: str, arguments: Mapping[str, Any], inputs: Mapping[str, Artifact]) -> dsl.base_component.BaseComponent:
    """Returns a pipeline of `component` alone, on what earlier runs left, as it runs on this machine."""

    @dsl.pipeline(name=f"sogclr-{component}")
    def again() -> None:
        COMPONENTS[component](**arguments, **_imported(inputs))

    return again


def _imported(inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    types = {kind.schema_title: kind for kind in (dsl.Dataset, dsl.Model)}
    return {
        name: dsl.importer(
            artifact_uri=artifact.uri, artifact_class=types[artifact.type], metadata=dict(artifact.metadata)
        ).output
        for name, artifact in inputs.items()
    }


# ---- On a cluster

LONGEST_HOURS = 168.0
"""The longest timeout of a custom job. 7 days is Vertex AI's default, and its pages name no longer one."""
_LIBTPU = "/opt/sogclr/lib/python3.11/site-packages/libtpu/libtpu.so"
"""In the TPU image, as the Dockerfile installs it."""
_PIPELINE_ACCOUNT = "{{$.pipeline_service_account}}"
"""Vertex AI puts the account of the pipeline in this place. Without an account, a custom job runs as Vertex AI's own agent."""


@dataclass(frozen=True)
class Cluster:
    """Where and how a compiled pipeline runs. Nothing of it changes a result."""

    images: Images
    accelerator: Accelerator | None = None
    """What pretraining runs on; None for plain containers, as any Kubeflow Pipelines runs them."""
    eval_accelerator: Accelerator = field(default_factory=lambda: accelerators.get("cpu"))
    environment: Mapping[str, str] = field(default_factory=dict)
    """Of every step. No secrets: it is in the YAML."""
    beam_args: tuple[str, ...] = ()
    timeout_hours: float = LONGEST_HOURS
    retries: int = 3
    """How often a step that fails, or whose machine is lost, is started again."""
    spot: bool = False
    disk_gb: int = 200
    service_account: str = ""
    """Of all steps; empty for the account that the pipeline runs as."""
    network: str = ""
    encryption_key: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    caching: bool = True

    @property
    def builds(self) -> tuple[Build, ...]:
        """Returns which images it needs."""
        used: list[Build] = ["cpu"]
        if self.accelerator:
            used += [self.eval_accelerator.build, self.accelerator.build]
        return tuple(dict.fromkeys(used))

    def accelerator_of(self, component: str) -> Accelerator | None:
        """Returns what a component has a custom job on, or None for one that is a plain container."""
        if self.accelerator is None:
            return None
        return {"pretrain": self.accelerator, "linear-eval": self.eval_accelerator}.get(component)

    def image_of(self, component: str) -> str:
        accelerator = self.accelerator_of(component)
        return self.images.reference(accelerator.build if accelerator else "cpu")

    def environment_of(self, component: str) -> dict[str, str]:
        environment = {**self.environment, variables.IMAGE: self.image_of(component)}
        if accelerator := self.accelerator_of(component):
            environment[variables.ACCELERATOR] = f"{accelerator.name} {accelerator.build} {accelerator.replicas}"
            if accelerator.build == "tpu":
                environment |= plugin_environment(_LIBTPU)
        return environment


def compile_pipeline(cluster: Cluster, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the whole pipeline as IR, with `defaults` for its parameters; parsed strictly into the real protos.

    Its parameters are those of `sogclr`, and on Vertex AI `base_output_directory`, the folder that checkpoints are under.
    """

    def dag(raw: Any, raw_identity: Any, preset: Any, overrides: Any, linear_eval_overrides: Any, **output: Any) -> None:
        with dsl.ExitHandler(_end(cluster), name="steps"):
            version = {component: step_version(component) for component in COMPONENTS}
            built = _task(
                cluster,
                "build-tfrecords",
                raw=raw,
                raw_identity=raw_identity,
                beam_args=list(cluster.beam_args),
                code_version=version["build-tfrecords"],
            )
            dataset = built.outputs["dataset"]
            pretrained = _task(
                cluster,
                "pretrain",
                preset=preset,
                overrides=overrides,
                code_version=version["pretrain"],
                dataset=dataset,
                **output,
            )
            model = pretrained.outputs["model"]
            evaluated = _task(
                cluster,
                "linear-eval",
                overrides=linear_eval_overrides,
                code_version=version["linear-eval"],
                dataset=dataset,
                model=model,
                **output,
            )
            join = record_lineage(
                job=dsl.PIPELINE_JOB_NAME_PLACEHOLDER, dataset=dataset, model=model, metrics=evaluated.outputs["metrics"]
            )
            _place(cluster, "record-lineage", join).set_caching_options(False)

    if cluster.accelerator is None:

        def pipeline(raw: str, raw_identity: str, preset: str, overrides: list[str], linear_eval_overrides: list[str]) -> None:
            dag(raw, raw_identity, preset, overrides, linear_eval_overrides)
    else:

        def pipeline(  # type: ignore[misc]  # KFP takes parameters from the signature, and these are the two there are
            raw: str,
            raw_identity: str,
            preset: str,
            overrides: list[str],
            linear_eval_overrides: list[str],
            base_output_directory: str,
        ) -> None:
            dag(raw, raw_identity, preset, overrides, linear_eval_overrides, base_output_directory=base_output_directory)

    return _compiled(cluster, pipeline, "sogclr", defaults)


def compile_step(
    cluster: Cluster, component: str, arguments: Mapping[str, Any], inputs: Mapping[str, Artifact], base_output_directory: str
) -> dict[str, Any]:
    """Returns a pipeline of `component` alone, on what an earlier job left, as IR."""
    output = {"base_output_directory": base_output_directory} if cluster.accelerator_of(component) else {}

    def pipeline() -> None:
        with dsl.ExitHandler(_end(cluster), name="steps"):
            _task(cluster, component, **arguments, **_imported(inputs), **output).set_caching_options(False)

    return _compiled(cluster, pipeline, f"sogclr-{component}", {})


def _end(cluster: Cluster) -> Any:
    return _place(cluster, "end-pipeline", end_pipeline(job=dsl.PIPELINE_JOB_NAME_PLACEHOLDER)).set_caching_options(False)


def _task(cluster: Cluster, component: str, **arguments: Any) -> Any:
    """Returns the task of a component: a custom job where it has a machine of its own, else a container."""
    accelerator = cluster.accelerator_of(component)
    if accelerator is None:
        task = _place(cluster, component, COMPONENTS[component](**arguments))
        if component == "build-tfrecords" and cluster.beam_args:
            return task.set_cpu_limit("2").set_memory_limit("8G")
        return task.set_cpu_limit("8").set_memory_limit("32G")
    return _retried(cluster, _custom_job(cluster, component)(**arguments).set_caching_options(cluster.caching))


def _place(cluster: Cluster, component: str, task: Any) -> Any:
    for name, value in cluster.environment_of(component).items():
        task.set_env_variable(name, value)
    return _retried(cluster, task.set_caching_options(cluster.caching))


def _retried(cluster: Cluster, task: Any) -> Any:
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


def _compiled(cluster: Cluster, function: Callable, name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    pipeline = dsl.pipeline(name=name, description="Raw images to TFRecords, SogCLR pretraining, linear eval.")(function)
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
            # What the library's function has no arguments for: the topology of a TPU, and an image of its own.
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
    """Parses a compiled pipeline, and the machines in it, into the protos that Vertex AI parses them into."""
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
        raise UserError(f"the compiled pipeline is none that Vertex AI takes: {error}") from error


def write(spec: Mapping[str, Any], output: Path) -> None:
    """Writes IR as YAML, whole or not at all."""
    write_whole(str(output), yaml.safe_dump(dict(spec), sort_keys=False).encode())
