"""The DAG, one step of it alone, and what identifies the code it runs."""

import hashlib
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kfp import compiler, dsl

from components.lineage import Artifact
from components.steps import COMPONENTS, build_tfrecords, linear_eval, pretrain

PROJECT = Path(__file__).absolute().parents[1]
"""The folder that the project's packages are in."""

_PACKAGES = ("beam_jobs", "components", "eval", "pipelines", "trainer")


class Outputs(NamedTuple):
    dataset: dsl.Dataset
    model: dsl.Model
    metrics: dsl.Metrics


@dsl.pipeline(name="sogclr", description="Raw images to TFRecords, SogCLR pretraining, linear eval.")
def sogclr(
    raw: str, raw_identity: str, preset: str, overrides: list[str], linear_eval_overrides: list[str], code_version: str
) -> Outputs:
    """The whole pipeline.

    Args:
        raw: Folder of the raw archives.
        raw_identity: Changes when the archives do; may be empty where nothing is taken from a cache.
        preset: The experiment.
        overrides: key=value for pretraining.
        linear_eval_overrides: key=value for the linear eval, as in linear_eval.seed=1.
        code_version: What `code_version` returns.
    """
    built = build_tfrecords(raw=raw, raw_identity=raw_identity, code_version=code_version)
    dataset = built.outputs["dataset"]
    model = pretrain(preset=preset, overrides=overrides, code_version=code_version, dataset=dataset).outputs["model"]
    evaluated = linear_eval(overrides=linear_eval_overrides, code_version=code_version, dataset=dataset, model=model)
    return Outputs(dataset, model, evaluated.outputs["metrics"])


def one_step(component: str, arguments: Mapping[str, Any], inputs: Mapping[str, Artifact]) -> dsl.base_component.BaseComponent:
    """Returns a pipeline of `component` alone, on what earlier runs left."""
    types = {kind.schema_title: kind for kind in (dsl.Dataset, dsl.Model)}

    @dsl.pipeline(name=f"sogclr-{component}")
    def again() -> None:
        imported = {
            name: dsl.importer(
                artifact_uri=artifact.uri, artifact_class=types[artifact.type], metadata=dict(artifact.metadata)
            ).output
            for name, artifact in inputs.items()
        }
        COMPONENTS[component](**arguments, **imported)

    return again


def compile_to(output: Path, defaults: Mapping[str, Any], image: str | None = None) -> None:
    """Writes the pipeline as IR YAML, whole or not at all, with `defaults` for its parameters and `image` for its executors."""
    import yaml

    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder, "pipeline.yaml")
        compiler.Compiler().compile(sogclr, str(compiled), pipeline_parameters=dict(defaults))
        spec = yaml.safe_load(compiled.read_text())
        if image:
            for executor in spec["deploymentSpec"]["executors"].values():
                executor["container"]["image"] = image
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_name(f".{output.name}.partial")
        partial.write_text(yaml.safe_dump(spec, sort_keys=False))
        partial.replace(output)


def code_version(project: Path = PROJECT) -> str:
    """Returns a short digest of the project's own sources, which KFP's cache does not see."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for file in sorted((project / package).rglob("*.py")):
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            digest.update(f"{file.relative_to(project).as_posix()} {content}\n".encode())
    return digest.hexdigest()[:16]


def git_commit() -> str:
    """Returns the commit that the sources were checked out at, or nothing where they are in no repository of their own."""
    if not (PROJECT / ".git").exists():
        return ""
    try:
        asked = subprocess.run(["git", "-C", str(PROJECT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return asked.stdout.strip()
