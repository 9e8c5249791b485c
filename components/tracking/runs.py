"""Calls that MLflow's client lacks: finding runs by a tag, and writing several tags, parameters or metrics at once."""

import time
from collections.abc import Mapping
from typing import Any

from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from components.tracking import names
from components.tracking.store import Store


def find(store: Store, run_id: str) -> Run | None:
    """Returns a run, or None if the store has no run of that ID."""
    try:
        return store.client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def search(store: Store, tag: str, value: str) -> list[Run]:
    """Returns the runs whose `tag` has that value, the oldest first."""
    return list(store.client.search_runs([store.experiment_id], f"tags.`{tag}` = '{value}'", order_by=["attributes.start_time"]))


def named_by(run: Run) -> dict[str, str]:
    """Returns the tags of `run` that name runs: itself and the runs whose outputs it used, or the steps it consists of."""
    return {key: value for key, value in run.data.tags.items() if key.startswith(names.RUN_OF)}


def set_tags(store: Store, run_id: str, tags: Mapping[str, str]) -> None:
    store.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])


def log_params(store: Store, run_id: str, params: Mapping[str, Any]) -> None:
    """Records parameters. A value that is a mapping becomes several parameters with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        flat |= {f"{key}.{inner}": item for inner, item in value.items()} if isinstance(value, Mapping) else {key: value}
    store.client.log_batch(run_id, params=[Param(key, _text(value)) for key, value in flat.items()])


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def log_metrics_once(store: Store, run_id: str, metrics: Mapping[str, float], step: int, **of: str) -> None:
    """Records metrics of the model and dataset `of`. Adds no point if the run already has the same value at the same step.

    MLflow keeps one of two equal points, so a known value is sent again with its original timestamp.
    """
    now, points = int(time.time() * 1000), []
    for name, value in metrics.items():
        there = store.client.get_metric_history(run_id, name)
        same = [point.timestamp for point in there if (point.step, point.value) == (step, float(value))]
        points.append(Metric(name, float(value), min(same, default=now), step, **of))
    store.client.log_batch(run_id, metrics=points)


def metric_histories(store: Store, run_id: str) -> dict[str, list[Metric]]:
    """Returns every point of every metric of a run, by the metric's name."""
    recorded = store.client.get_run(run_id).data.metrics
    return {name: list(store.client.get_metric_history(run_id, name)) for name in recorded}
