"""The files and folders that recorded runs refer to."""

from collections.abc import Iterator
from typing import Any

from mlflow.entities import Run

from components.lineage import short
from components.tracking import names, step_file
from components.tracking.store import Store


def references(store: Store) -> Iterator[tuple[str, str, set[str]]]:
    """Yields each recorded run that was not deleted: its ID, its short ID with its name, and the texts that may name files.

    These are its arguments and outputs, and its datasets.
    """
    for run in store.client.search_runs([store.experiment_id], max_results=50000):
        recorded = step_file.read(store, run.info.run_id) if names.COMPONENT in run.data.tags else {}
        yield run.info.run_id, f"{short(run.info.run_id)} {run.info.run_name}", {*_texts(recorded), *_datasets(run)}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)


def _datasets(run: Run) -> Iterator[str]:
    for one in run.inputs.dataset_inputs if run.inputs else ():
        yield from (tag.value for tag in one.tags if tag.key == names.DATASET_URI)
