"""Metrics of a step. Logging never waits, and metrics survive a server outage and a killed process."""

import time
from collections.abc import Mapping

from mlflow.entities import Metric

from components.outbox import Outbox, Point
from components.patience import PATIENCE_OF_STEPS
from components.tracking import names, registry, runs
from components.tracking.datasets import name_and_digest
from components.tracking.recorded import History, history, knows
from components.tracking.step_file import KfpArtifact
from components.tracking.store import Store, impatient


class Metrics:
    """The metrics of one run: training metrics, sent through an outbox, and final metrics of a model on a dataset."""

    def __init__(self, store: Store, run_id: str) -> None:
        self._store, self._run_id = store, run_id
        self._recorded: set[tuple[str, int]] = set()
        """Names and steps of the metrics that earlier attempts recorded."""
        client = impatient(store).client
        self._outbox = Outbox(
            lambda points: client.log_batch(run_id, metrics=[Metric(*point) for point in points]), PATIENCE_OF_STEPS
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Records metrics without waiting for the store. Keeps the values that an earlier attempt recorded at the same step."""
        now = int(time.time() * 1000)
        new = {name: float(value) for name, value in metrics.items() if (name, step) not in self._recorded}
        self._outbox.put([(name, value, now, step) for name, value in new.items()])

    def log_final(self, metrics: Mapping[str, float], model_id: str, dataset: KfpArtifact | None, step: int) -> None:
        """Records metrics of a model on a dataset, or of the dataset alone if this store lacks the model.

        `dataset` is None for metrics that belong to no dataset.

        Adds no point if this run already has the same value at the same step, from training or from an earlier attempt.
        """
        about = {f"dataset_{key}": value for key, value in name_and_digest(dataset).items()} if dataset else {}
        about |= {"model_id": model_id} if registry.has_model(self._store, model_id) else {}
        self.flush()
        runs.log_metrics_once(self._store, self._run_id, metrics, step, **about)

    def skip_recorded(self) -> None:
        """Reads the metrics that earlier attempts recorded in this run, so that `log` does not repeat them.

        An attempt resumes from a checkpoint, which is older than the last logged step.
        """
        for name, points in runs.metric_histories(self._store, self._run_id).items():
            self._recorded |= {(name, point.step) for point in points}

    def keep_in(self, folder: str, finished_by: str = "") -> None:
        """Keeps undelivered metrics in `folder`, and delivers those that an earlier attempt left there.

        If the earlier attempt had another run, or if the run `finished_by` finished the work in the folder, copies that run's
        history into this one and tags this one with its ID.
        """

        def inherit(before: str) -> list[Point]:
            if not knows(self._store, before):
                return []
            self._store.client.set_tag(self._run_id, names.RESUMED_FROM, before)
            found = runs.metric_histories(self._store, before)
            return [(name, one.value, one.timestamp, one.step) for name, points in found.items() for one in points]

        self._outbox.keep_in(folder, self._run_id, inherit, finished_by)
        self._recorded |= {(name, step) for name, _, _, step in self._outbox.taken_over}

    def history(self) -> History:
        """Returns every metric that this run recorded."""
        self.flush()
        return history(self._store, self._run_id)

    def settle(self) -> None:
        """Waits, at most 60 s, until a SIGKILL would lose no metric."""
        self._outbox.settle()

    def flush(self) -> None:
        """Waits until the store has every metric. Raises UserError if the store refuses them."""
        self._outbox.flush()

    def close(self, finished: bool = False) -> None:
        """Tries once more to send all metrics. The rest stays in a file, which is removed once the step is `finished`."""
        self._outbox.close(finished)

    def abandon(self) -> None:
        """Forgets the undelivered metrics, because another process now does the same work."""
        self._outbox.abandon()
