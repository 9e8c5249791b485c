"""Metrics of a step: training logs them without waiting, and they survive a server that is down and a process that is killed."""

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
    """The metrics of one run: those of training, through an outbox, and the final ones, of a model on a dataset."""

    def __init__(self, store: Store, run_id: str) -> None:
        self._store, self._run_id = store, run_id
        self._recorded: set[tuple[str, int]] = set()
        """Metrics and steps that earlier attempts recorded."""
        client = impatient(store).client
        self._outbox = Outbox(
            lambda points: client.log_batch(run_id, metrics=[Metric(*point) for point in points]), PATIENCE_OF_STEPS
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Records metrics, without waiting for the store. Those that an earlier attempt recorded of the same step stay."""
        now = int(time.time() * 1000)
        new = {name: float(value) for name, value in metrics.items() if (name, step) not in self._recorded}
        self._outbox.put([(name, value, now, step) for name, value in new.items()])

    def log_final(self, metrics: Mapping[str, float], model_id: str, dataset: KfpArtifact, step: int) -> None:
        """Records metrics as those of a model on a dataset; on the dataset alone where another store has the model.

        Adds no point where this run has the same value of the same step, from training or from an earlier attempt.
        """
        about = {f"dataset_{key}": value for key, value in name_and_digest(dataset).items()}
        about |= {"model_id": model_id} if registry.has_model(self._store, model_id) else {}
        self.flush()
        runs.log_metrics_once(self._store, self._run_id, metrics, step, **about)

    def skip_recorded(self) -> None:
        """Reads what earlier attempts recorded in this run, which goes on before the last step that they logged."""
        for name, points in runs.metric_histories(self._store, self._run_id).items():
            self._recorded |= {(name, point.step) for point in points}

    def keep_in(self, folder: str) -> None:
        """Keeps undelivered metrics in `folder`, and delivers those that an earlier attempt left there.

        Where the earlier attempt had another run, copies that run's history into this one, and says whose it is.
        """

        def inherit(before: str) -> list[Point]:
            if not knows(self._store, before):
                return []
            self._store.client.set_tag(self._run_id, names.RESUMED_FROM, before)
            found = runs.metric_histories(self._store, before)
            return [(name, one.value, one.timestamp, one.step) for name, points in found.items() for one in points]

        self._outbox.keep_in(folder, self._run_id, inherit)
        self._recorded |= {(name, step) for name, _, _, step in self._outbox.taken_over}

    def history(self) -> History:
        """Returns every metric that this run recorded."""
        self.flush()
        return history(self._store, self._run_id)

    def settle(self) -> None:
        """Returns once a SIGKILL would lose none of the metrics; waits a minute at most."""
        self._outbox.settle()

    def flush(self) -> None:
        """Waits until the store has every metric. Raises UserError if it refuses them."""
        self._outbox.flush()

    def close(self, finished: bool = False) -> None:
        """Sends what can be sent at once. The rest stays in the outbox's file, which is removed once the step is `finished`."""
        self._outbox.close(finished)

    def abandon(self) -> None:
        """Forgets the metrics that the store lacks, since another process does the same work now."""
        self._outbox.abandon()
