"""Descriptions of runs for MLflow's UI, with links to the runs that each run used and to those that used it."""

from collections.abc import Mapping

from mlflow.entities import Run

from components.lineage import COMPONENTS, MADE_BY, Lineage, Step, short
from components.tracking import names, picture, runs
from components.tracking.recorded import lineage, read_step
from components.tracking.store import Store

_VIEW = "?workflowType=machine_learning"
"""Makes the UI show its pages about training. Without it, it shows its pages about agents."""


def redraw(store: Store, pipeline_id: str) -> None:
    """Updates the lineage picture of a pipeline run, and the descriptions of the run, its steps and the step that it repeats."""
    chain = lineage(store, pipeline_id)
    store.client.log_figure(pipeline_id, picture.lineage(chain), names.LINEAGE_PICTURE)
    tags = store.client.get_run(pipeline_id).data.tags
    store.client.set_tag(pipeline_id, names.NOTE, _pipeline_note(store, chain, tags))
    steps = {step.run_id: step for step in chain.steps}
    if runs.find(store, tags.get(names.RERUN_OF, "")):
        steps[tags[names.RERUN_OF]] = read_step(store, tags[names.RERUN_OF])
    for run_id, one in steps.items():
        store.client.set_tag(run_id, names.NOTE, _step_note(store, one))


def _pipeline_note(store: Store, chain: Lineage, tags: Mapping[str, str]) -> str:
    lines = []
    for one in chain.steps:
        reused = f", reused from {_link(store, one.pipeline_id, short(one.pipeline_id))}" if chain.reused(one) else ""
        lines.append(f"- {_link(store, one.run_id, one.component)}{reused}: {_made(one)}")
    if runs.find(store, again := tags.get(names.RERUN_OF, "")):
        lines.append(f"- Reruns {_link(store, again, 'run ' + short(again))}")
    if names.JOB_LINK in tags:
        lines.append(f"- Vertex AI: [job {tags[names.JOB]}]({tags[names.JOB_LINK]})")
    if names.COMMAND in tags:
        lines.append(f"- Run again: `{tags[names.COMMAND]}`")
    return "\n".join([*lines, "", f"![lineage](get-artifact?run_uuid={chain.run_id}&path={names.LINEAGE_PICTURE})"])


def _step_note(store: Store, one: Step) -> str:
    tags = store.client.get_run(one.run_id).data.tags
    sources = [tags[names.RUN_OF + name] for name in COMPONENTS if name != one.component and names.RUN_OF + name in tags]
    dependents = runs.search(store, names.RUN_OF + one.component, one.run_id)
    later = [run for run in dependents if run.info.run_id not in (one.run_id, one.pipeline_id)]
    used_by = [run for run in later if run.data.tags[names.COMPONENT] != names.PIPELINE]
    reused_by = [run for run in later if run.data.tags[names.COMPONENT] == names.PIPELINE]
    rerun_by = runs.search(store, names.RERUN_OF, one.run_id)
    lines = [f"**{one.component}** of {_link(store, one.pipeline_id, 'pipeline run ' + short(one.pipeline_id))}", ""]
    for argument in ("raw", "encoder"):
        if argument in one.arguments:
            lines.append(f"- From: `{one.arguments[argument]}`")
    if names.SOURCE_SHA256 in tags:
        lines.append(f"- Source: {tags[names.SOURCE_FORMAT]}, sha256 `{tags[names.SOURCE_SHA256]}`")
    for source in (read_step(store, run_id) for run_id in sources if runs.find(store, run_id)):
        lines.append(f"- From: {_link(store, source.run_id, source.component)}, {_made(source)}")
    if names.INIT_FROM in tags:
        by = f"{_link(store, made, short(made))}, " if runs.find(store, made := tags.get(names.INIT_RUN, "")) else ""
        lines.append(f"- Started from: {by}`{tags[names.INIT_FROM]}`, state `{tags[names.INIT_STATE][:16]}`")
    lines.append(f"- Made: {_made(one)}")
    if names.DEVICE in tags:
        lines.append(f"- Ran on: {tags[names.DEVICE]}, TensorFlow {tags[names.TENSORFLOW]}, replicas: {tags[names.REPLICAS]}")
    if "report" in one.outputs:
        page = f"#/experiments/{store.experiment_id}/runs/{one.run_id}/artifacts/{names.REPORT}"
        lines.append(f"- Report: [{names.REPORT}]({page})")
    if runs.find(store, before := tags.get(names.RESUMED_FROM, "")):
        lines.append(f"- Resumed from the checkpoints of {_link(store, before, short(before))}")
    for title, others in (("Used by", used_by), ("Reused by", reused_by), ("Rerun by", rerun_by)):
        if others:
            lines.append(f"- {title}: " + ", ".join(_link(store, run.info.run_id, _title(run)) for run in others))
    if names.COMMAND in tags:  # else it died as soon as it had a run
        lines.append(f"- Run again: `{tags[names.COMMAND]}`")
    return "\n".join(lines)


def _made(one: Step) -> str:
    """Describes the output of a step in a few words of Markdown."""
    if not one.outputs:
        return f"nothing yet, {one.status.lower()} {one.error}".strip()
    about = next(iter(one.outputs.values()))
    if one.component == "build-tfrecords":
        counts = f"{about.count('train_images'):,} training and {about.count('validation_images'):,} validation images"
        return f"dataset `{about.short('fingerprint', 16)}`, {counts} in {about.count('classes'):,} classes"
    if one.component in MADE_BY["model"]:
        name, version = about.metadata["model_name"], about.metadata["model_version"]
        how = f"from {about.metadata['format']}" if "format" in about.metadata else f"{about.count('steps'):,} steps"
        return f"encoder [{name} version {version}](#/models/{name}/versions/{version}{_VIEW}), {how}"
    control = about.metadata.get("untrained_top_1_accuracy")
    beside = "no untrained control" if control is None else f"untrained control {float(control):.1%}"
    return f"top-1 {float(about.metadata['top_1_accuracy']):.1%}, {beside}"


def _title(run: Run) -> str:
    component = run.data.tags[names.COMPONENT]
    return f"{'pipeline run' if component == names.PIPELINE else component} {short(run.info.run_id)}"


def _link(store: Store, run_id: str, text: str) -> str:
    return f"[{text}](#/experiments/{store.experiment_id}/runs/{run_id}{_VIEW})"
