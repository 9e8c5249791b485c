"""What a component records in MLflow, and what leads from there to everything else. With a real store in SQLite."""

import json
import os
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

import mlflow
import pytest
from kfp import dsl
from matplotlib.figure import Figure
from mlflow import MlflowClient
from support.loopback import skip_waits

from components import patience, tracking, variables
from components.tracking import step_runs
from components.tracking.phase import Phase
from trainer.shared.errors import UserError

FINGERPRINT = "3fa9" * 16
ACCURACIES = {"top_1_accuracy": 0.66, "top_5_accuracy": 0.95, "untrained_top_1_accuracy": 0.57, "untrained_top_5_accuracy": 0.9}


class Bench:
    """A store with steps that do nothing but record."""

    def __init__(self, folder, environ):
        self.folder = folder
        self.uri = environ["MLFLOW_TRACKING_URI"]
        self.store = tracking.open_store(self.uri, artifacts=str(folder / "artifacts"))
        self.client = MlflowClient(self.uri)

    def pipeline(self, **more):
        about = {"command": ["sogclr", "run", "--preset", "demo"], "root": "runs", "code_version": "c0de", "params": {}, **more}
        return tracking.start_pipeline(self.store, "demo", **about)

    def environ(self, pipeline_id):
        return {"MLFLOW_TRACKING_URI": self.uri, "MLFLOW_RUN_ID": pipeline_id}

    def artifact(self, kind, job, task, name):
        return kind(name=name, uri=str(self.folder / "kfp" / job / task / name), metadata={})

    def build(self, pipeline_id, job="job"):
        dataset = self.artifact(dsl.Dataset, job, "build-tfrecords", "dataset")
        arguments = {"raw": "/raw", "code_version": "c0de"}
        if tracking.recorded_before("build-tfrecords", arguments, {"dataset": dataset}, self.environ(pipeline_id)):
            return dataset
        with tracking.step("build-tfrecords", arguments, {"dataset": dataset}, environ=self.environ(pipeline_id)) as run:
            about = {
                "name": "images",
                "fingerprint": FINGERPRINT,
                "train_images": 36.0,
                "validation_images": 12.0,
                "classes": 3.0,
            }
            dataset.metadata.update(about)
            run.datasets.log(dataset, "output")
        return dataset

    def pretrain(self, pipeline_id, dataset):
        model = self.artifact(dsl.Model, "job", "pretrain", "model")
        arguments = {"preset": "demo", "overrides": ["epochs=1"], "code_version": "c0de"}
        environ = self.environ(pipeline_id)
        with tracking.step("pretrain", arguments, {"model": model}, {"dataset": dataset}, environ) as run:
            run.log_params({"seed": 0, "linear_eval": {"seed": 1}})
            run.datasets.log(dataset, "training")
            for step in range(1, 4):
                run.metrics.log({"train/contrastive_loss": -1 / step}, step)
            assert run.metrics.history() == {"train/contrastive_loss": [(1, -1.0), (2, -0.5), (3, -1 / 3)]}
            self.log_encoder(run, dataset, model)
        return model

    def log_encoder(self, run, dataset, model=None, state=""):
        model = model or self.artifact(dsl.Model, "job", "pretrain", "model")
        for file in ("checkpoint.npz", "export/saved_model/saved_model.pb", "export/encoder.keras", "export/README.md"):
            path = Path(model.uri, file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("weights")
        model.metadata.update(preset="demo", steps=3)
        params = {"preset": "demo", "state_sha256": state or uuid.uuid4().hex}
        about = {"params": params, "metrics": {"train/contrastive_loss": -1 / 3}, "step": 3}
        run.encoders.log(model, dataset, [f"{model.uri}/checkpoint.npz"], f"{model.uri}/export", **about)
        return model

    def linear_eval(self, pipeline_id, dataset, model, top_1=0.66):
        metrics = self.artifact(dsl.Metrics, "job", "linear-eval", "metrics")
        inputs = {"model": model, "dataset": dataset}
        arguments = {"overrides": [], "code_version": "c0de"}
        with tracking.step("linear-eval", arguments, {"metrics": metrics}, inputs, self.environ(pipeline_id)) as run:
            run.datasets.log(dataset, "eval")
            run.encoders.use(model)
            final = {f"eval/{name}": value for name, value in ACCURACIES.items()}
            run.metrics.log_final(final, model.metadata["model_id"], dataset, 3)
            run.encoders.rate(model, dataset, f"# Card\n\n{top_1:.0%}\n\n## Use\n\n{'at length ' * 600}", top_1)
            files = {"train": {"path": f"{metrics.uri}/train.parquet", "digest": "5" * 64, "images": 36, "dimensions": 8}}
            run.datasets.log_features(dataset, files)
            run.log_figure(Figure(), "confusion.png")
            for name, value in ACCURACIES.items():
                metrics.log_metric(name, value)
        return metrics


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a root")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        yield Bench(folder, os.environ)


@pytest.fixture(scope="module")
def chain(bench):
    """A pipeline run in which every step recorded something: IDs of its runs."""
    pipeline_id = bench.pipeline(git_commit="abc")
    dataset = bench.build(pipeline_id)
    model = bench.pretrain(pipeline_id, dataset)
    metrics = bench.linear_eval(pipeline_id, dataset, model)
    tracking.end_pipeline(bench.store, pipeline_id, "FINISHED")
    made = {"build-tfrecords": dataset, "pretrain": model, "linear-eval": metrics}
    return {"pipeline": pipeline_id} | {name: artifact.metadata["run_id"] for name, artifact in made.items()}


def test_features_are_a_dataset_that_names_its_file_and_the_images_that_it_is_of(bench, chain):
    inputs = bench.client.get_run(chain["linear-eval"]).inputs.dataset_inputs
    by_context = {next(tag.value for tag in one.tags if tag.key == "mlflow.data.context"): one for one in inputs}
    assert set(by_context) == {"eval", "features"}
    features, tags = by_context["features"].dataset, {tag.key: tag.value for tag in by_context["features"].tags}
    assert (features.name, features.digest) == ("images-features-train", "5" * 36)
    assert json.loads(features.source) == {"uri": tags["uri"], "run_id": chain["linear-eval"]}
    assert tags["uri"].endswith("/train.parquet")
    assert tags["fingerprint"] == FINGERPRINT


def test_the_linear_eval_run_alone_leads_to_model_pretraining_dataset_and_conversion(bench, chain):
    run = bench.client.get_run(chain["linear-eval"])
    model = bench.client.get_logged_model(run.inputs.model_inputs[0].model_id)
    pretraining = bench.client.get_run(model.source_run_id)
    assert model.source_run_id == chain["pretrain"]
    assert [one.model_id for one in pretraining.outputs.model_outputs] == [model.model_id]

    for one in (run, pretraining):
        dataset = next(entry for entry in one.inputs.dataset_inputs if "features" not in entry.dataset.name)
        tags = {tag.key: tag.value for tag in dataset.tags}
        assert FINGERPRINT.startswith(dataset.dataset.digest)
        assert tags["fingerprint"] == one.data.tags["sogclr.dataset_fingerprint"] == FINGERPRINT
        assert tags["run_id"] == json.loads(dataset.dataset.source)["run_id"] == chain["build-tfrecords"]
    conversion = bench.client.get_run(chain["build-tfrecords"])
    assert conversion.data.params["raw"] == "/raw"
    assert {run.data.tags["mlflow.parentRunId"] for run in (run, pretraining, conversion)} == {chain["pipeline"]}


def test_accuracies_belong_to_the_model_and_the_dataset(bench, chain):
    run = bench.client.get_run(chain["linear-eval"])
    model = bench.client.get_logged_model(run.inputs.model_inputs[0].model_id)
    top_1 = next(metric for metric in model.metrics if metric.key == "eval/top_1_accuracy")
    assert (top_1.value, top_1.dataset_digest, top_1.run_id) == (0.66, FINGERPRINT[:36], chain["linear-eval"])
    (version,) = bench.client.search_model_versions(f"name = '{tracking.ENCODER}'")
    assert version.source == f"models:/{model.model_id}"
    assert version.tags["dataset_fingerprint"] == FINGERPRINT
    measured = {"top_1": "0.66", "top_1.dataset_fingerprint": FINGERPRINT, "top_1.run_id": chain["linear-eval"]}
    assert measured.items() <= version.tags.items()
    # Whole sections of the card, as many as there is room for.
    assert version.description == "# Card\n\n66%\n"


def test_runs_say_in_links_where_they_come_from_and_what_came_of_them(bench, chain):
    notes = {name: bench.client.get_run(run_id).data.tags["mlflow.note.content"] for name, run_id in chain.items()}
    for name, others in {
        "build-tfrecords": ("pretrain", "linear-eval", "pipeline"),
        "pretrain": ("build-tfrecords", "linear-eval", "pipeline"),
        "linear-eval": ("build-tfrecords", "pretrain", "pipeline"),
        "pipeline": ("build-tfrecords", "pretrain", "linear-eval"),
    }.items():
        for other in others:
            assert f"/runs/{chain[other]}" in notes[name], (name, other)
    assert "66.0%" in notes["pipeline"]
    assert f"`sogclr rerun pretrain --run {chain['pretrain']} --root runs`" in notes["pretrain"]
    assert [file.path for file in bench.client.list_artifacts(chain["pipeline"])] == ["lineage.png"]


def test_steps_record_code_parameters_and_commit(bench, chain):
    data = bench.client.get_run(chain["pretrain"]).data
    assert data.params == {
        "preset": "demo",
        "overrides": "epochs=1",
        "code_version": "c0de",
        "seed": "0",
        "linear_eval.seed": "1",
    }
    assert data.tags["mlflow.source.git.commit"] == "abc"
    assert data.tags["sogclr.code_version"] == "c0de"


def test_a_later_pipeline_that_reuses_steps_says_whose_they_are(bench, chain):
    pipeline_id = bench.pipeline()
    lineage = tracking.end_pipeline(bench.store, pipeline_id, "FINISHED", [chain["linear-eval"]])
    assert [(step.run_id, lineage.reused(step)) for step in lineage.steps] == [
        (chain[step.component], True) for step in lineage.steps
    ]
    assert len(lineage.steps) == 3
    run = bench.client.get_run(pipeline_id)
    assert "reused from" in run.data.tags["mlflow.note.content"]
    assert run.data.metrics["eval/top_1_accuracy"] == 0.66
    assert f"/runs/{pipeline_id}" in bench.client.get_run(chain["pretrain"]).data.tags["mlflow.note.content"]


def test_an_equal_dataset_of_another_conversion_leads_to_that_conversion(bench, chain):
    pipeline_id = bench.pipeline()
    again = bench.build(pipeline_id, "another-job")
    (dataset,) = bench.client.get_run(again.metadata["run_id"]).inputs.dataset_inputs
    tags = {tag.key: tag.value for tag in dataset.tags}
    assert (tags["run_id"], tags["uri"]) == (again.metadata["run_id"], again.uri)


@pytest.mark.parametrize(
    ("error", "status", "message", "mendable"),
    [
        (UserError("gamma=2 makes\nno sense"), "FAILED", "gamma=2 makes no sense", True),
        (MemoryError("no room"), "FAILED", "MemoryError: no room", False),
        (KeyboardInterrupt(), "KILLED", "KeyboardInterrupt:", False),
    ],
)
def test_a_step_that_fails_says_why_in_one_line_and_leaves_its_pipeline_open(bench, error, status, message, mendable):
    pipeline_id = bench.pipeline()
    dataset = bench.artifact(dsl.Dataset, "failing", "build-tfrecords", "dataset")
    with suppress(type(error)), tracking.step("build-tfrecords", {}, {"dataset": dataset}, environ=bench.environ(pipeline_id)):
        raise error
    assert bench.client.get_run(pipeline_id).info.status == "RUNNING"
    failed = tracking.end_pipeline(bench.store, pipeline_id, "FAILED").failed
    assert (failed.status, failed.error.strip(), failed.user_error) == (status, message, mendable)


@pytest.mark.parametrize("error", [MemoryError("no room"), patience.UnansweredError("MLflow answers HTTP 503")])
def test_a_step_that_fails_while_the_server_is_down_fails_for_its_own_reason(bench, monkeypatch, capsys, error):
    skip_waits(monkeypatch)
    pipeline_id = bench.pipeline()
    dataset = bench.artifact(dsl.Dataset, type(error).__name__, "build-tfrecords", "dataset")
    asked = []

    def nobody(*_, **__):
        asked.append(1)
        raise ConnectionRefusedError(111, "Connection refused")

    def fail():
        for call in ("log_batch", "set_tag", "set_terminated", "get_run"):
            down.setattr(MlflowClient, call, nobody)
        raise error

    step = tracking.step("build-tfrecords", {}, {"dataset": dataset}, environ=bench.environ(pipeline_id))
    with monkeypatch.context() as down, pytest.raises(type(error), match=str(error)), step:
        fail()
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("warning: MLflow does not know that this step failed: MLflow does not answer (connection refused)")
    if isinstance(error, patience.UnansweredError):
        assert len(asked) == 1, "the step has waited once already"
    assert tracking.end_pipeline(bench.store, pipeline_id, "FAILED").failed.status == "KILLED"


def test_a_step_that_vanished_is_said_to_be_killed(bench):
    pipeline_id = bench.pipeline()
    dataset = bench.artifact(dsl.Dataset, "vanished", "build-tfrecords", "dataset")
    step = tracking.step("build-tfrecords", {}, {"dataset": dataset}, environ=bench.environ(pipeline_id))
    step.__enter__()
    assert tracking.end_pipeline(bench.store, pipeline_id, "FAILED").failed.status == "KILLED"


def test_without_a_parent_in_the_environment_the_job_s_name_finds_it(bench):
    first, second, other = (
        tracking.pipeline_of_job(bench.store, tracking.job_of(f"gs://bucket/root/123/{output}"))
        for output in ("sogclr-1/build-tfrecords_7/dataset", "sogclr-1/pretrain_8/model", "sogclr-2/pretrain_8/model")
    )
    assert first == second != other
    dataset = bench.artifact(dsl.Dataset, "a-job", "build-tfrecords", "dataset")
    with tracking.step("build-tfrecords", {}, {"dataset": dataset}, environ={"MLFLOW_TRACKING_URI": bench.uri}) as run:
        parent = bench.client.get_run(run.run_id).data.tags["mlflow.parentRunId"]
        dataset.metadata.update(fingerprint=FINGERPRINT)
    assert parent == tracking.pipeline_of_job(bench.store, "a-job")


def test_jobs_of_one_name_in_two_projects_or_regions_are_two_runs(bench):
    europe, asia, elsewhere = (
        f"projects/{p}/locations/{r}" for p, r in (("p", "europe-west4"), ("p", "asia-east1"), ("q", "asia-east1"))
    )
    old = bench.client.create_run(
        bench.store.experiment_id, tags={"sogclr.component": "pipeline", "sogclr.job": "twin"}
    ).info.run_id

    def run_of(folder):
        return tracking.pipeline_of_job(bench.store, "twin", {variables.JOB_FOLDER: folder} if folder else {})

    runs = {folder: run_of(folder) for folder in (europe, asia, elsewhere)}
    assert len({old, *runs.values()}) == 4
    assert {folder: run_of(folder) for folder in runs} == runs
    assert bench.client.get_run(runs[asia]).data.tags["sogclr.job_folder"] == asia
    assert run_of("") == old, "from before jobs had folders"


def test_a_run_is_found_by_the_beginning_of_its_id(bench, chain):
    assert tracking.find_run(bench.store, chain["pretrain"][:8]) == chain["pretrain"]
    for prefix, message in ((chain["pretrain"][:7], "too short"), ("0" * 32, "there is no run")):
        with pytest.raises(UserError, match=message):
            tracking.find_run(bench.store, prefix)


def test_a_step_is_found_from_its_pipeline_and_from_every_step_of_it(bench, chain):
    for name in ("pipeline", "build-tfrecords", "pretrain", "linear-eval"):
        assert tracking.find_step(bench.store, chain[name], "pretrain").run_id == chain["pretrain"]
    stranger = bench.client.create_run(bench.store.experiment_id).info.run_id
    with pytest.raises(UserError, match="no run of sogclr"):
        tracking.find_step(bench.store, stranger, "pretrain")
    with pytest.raises(UserError, match="has no pretrain"):
        tracking.find_step(bench.store, bench.pipeline(), "pretrain")


def test_the_champion_is_the_best_measured_on_its_dataset_and_latest_the_newest(bench, chain):
    run = tracking.StepRun(bench.store, bench.client.create_run(bench.store.experiment_id).info.run_id)
    ours, theirs = (bench.artifact(dsl.Dataset, "job", name, "dataset") for name in ("ours", "theirs"))
    ours.metadata.update(name="images", fingerprint=FINGERPRINT)
    theirs.metadata.update(name="images", fingerprint="5b" * 32)
    us, them = "champion-" + FINGERPRINT[:12], "champion-" + "5b" * 6

    def measured(dataset, top_1, model=None):
        """Measures a model, a new one if none is given; returns it and which versions, from 0 on, the aliases are of."""
        model = model or bench.log_encoder(run, dataset)
        run.encoders.rate(model, dataset, "# Card", top_1)
        aliases = bench.client.get_registered_model(tracking.ENCODER).aliases
        return model, {alias: int(version) - first for alias, version in aliases.items()}

    first = int(bench.client.get_registered_model(tracking.ENCODER).aliases["champion"])
    second, champions = measured(ours, 0.7)
    assert champions == {"champion": 1, us: 1}
    assert measured(ours, 0.69)[1] == {"champion": 1, us: 1}
    assert measured(ours, 0.7)[1] == {"champion": 1, us: 1}, "an equal one is no better"
    assert measured(theirs, 0.99)[1] == {"champion": 1, us: 1, them: 4}, "accuracies on other images do not compare"
    assert measured(ours, 0.68, second)[1] == {"champion": 3, us: 3, them: 4}, "it measures less when it is measured again"
    bench.client.delete_registered_model_alias(tracking.ENCODER, "champion")
    newest, champions = measured(theirs, 0.98)
    assert champions == {"champion": 4, us: 3, them: 4}
    latest = mlflow.models.get_model_info(f"models:/{tracking.ENCODER}/latest")
    assert latest.model_id == newest.metadata["model_id"]
    run.close()


class Killed(BaseException):
    """Ends an attempt as SIGKILL does: nothing after it is done."""


class Failing:
    """A client whose call number `at` is carried out, and whose answer is `error`."""

    def __init__(self, client, at, error):
        self.client, self.at, self.error, self.calls = client, at, error, 0

    def __getattr__(self, name):
        def call(*args, **named):
            answer = getattr(self.client, name)(*args, **named)
            self.calls += 1
            if self.calls == self.at:
                raise self.error
            return answer

        return call


@pytest.mark.thorough
@pytest.mark.parametrize("error", [Killed(), ConnectionResetError(104, "Connection reset by peer")], ids=["killed", "lost"])
def test_recording_an_encoder_leaves_one_model_and_one_version_wherever_it_was_cut(bench, error, monkeypatch):
    skip_waits(monkeypatch)
    dataset = bench.artifact(dsl.Dataset, "job", "cut", "dataset")
    dataset.metadata.update(name="images", fingerprint=FINGERPRINT)
    at, cut = 0, True
    while cut:
        at += 1
        run_id = bench.client.create_run(bench.store.experiment_id).info.run_id
        bench.client.log_metric(run_id, "train/contrastive_loss", -1 / 3, step=3)
        failing = Failing(bench.client, at, error)
        patient = patience.PatientClient(failing, 60)
        for client in (patient, bench.client):
            run = tracking.StepRun(tracking.Store(client, bench.store.experiment_id), run_id)
            try:
                model = bench.log_encoder(run, dataset, state=run_id)
                run.encoders.rate(model, dataset, "# Card", 0.0)
            except Killed:
                pass
            finally:
                run.close()
        cut = failing.calls >= at
        found = bench.client.search_logged_models([bench.store.experiment_id], f"source_run_id = '{run_id}'")
        assert [(one.model_id, str(one.status)) for one in found] == [(model.metadata["model_id"], "READY")], at
        (version,) = bench.client.search_model_versions(f"run_id = '{run_id}'")
        assert (str(version.version), version.source) == (model.metadata["model_version"], f"models:/{found[0].model_id}")
        assert version.tags.items() >= {"state_sha256": run_id, "top_1": "0.0", "dataset_fingerprint": FINGERPRINT}.items()
        assert version.description == "# Card"
        assert json.loads(found[0].tags["mlflow.modelVersions"]) == [{"name": tracking.ENCODER, "version": str(version.version)}]
        recorded = bench.client.get_run(run_id)
        assert [one.model_id for one in recorded.outputs.model_outputs] == [found[0].model_id]
        assert [metric.key for metric in found[0].metrics] == ["train/contrastive_loss"]
        assert len(bench.client.get_metric_history(run_id, "train/contrastive_loss")) == 1, at
    assert at > 10


class Dying(Failing):
    """A client whose process dies when call number `at` is carried out."""

    def __getattr__(self, name):
        if self.calls >= self.at:
            raise self.error
        return super().__getattr__(name)


@pytest.mark.thorough
@pytest.mark.parametrize("is_ended", [False, True])
def test_a_step_that_is_killed_anywhere_has_its_place_in_the_lineage_and_is_gone_on_with(bench, is_ended, monkeypatch):
    at, is_cut = 0, True
    while is_cut:
        at += 1
        pipeline_id = bench.pipeline()
        dying = Dying(bench.client, at, Killed())
        store = tracking.Store(dying, bench.store.experiment_id)
        with monkeypatch.context() as patch, suppress(Killed):
            patch.setattr(step_runs, "open_job_store", lambda environ, store=store: store)
            bench.build(pipeline_id, f"killed-{is_ended}-{at}")
        is_cut = dying.calls >= at
        nested = bench.client.search_runs([bench.store.experiment_id], f"tags.`mlflow.parentRunId` = '{pipeline_id}'")
        begun = [run.info.run_id for run in nested]
        if is_ended:
            found = tracking.end_pipeline(bench.store, pipeline_id, "FAILED")
            assert [step.run_id for step in found.steps] == begun, at
            assert all(step.status in ("KILLED", "FINISHED") for step in found.steps), at
        run_id = bench.build(pipeline_id, f"killed-{is_ended}-{at}").metadata["run_id"]
        assert begun in ([], [run_id]), at
        found = tracking.end_pipeline(bench.store, pipeline_id, "FINISHED")
        assert [(step.run_id, step.status) for step in found.steps] == [(run_id, "FINISHED")], at
        note = bench.client.get_run(run_id).data.tags["mlflow.note.content"]
        assert f"- Run again: `sogclr rerun build-tfrecords --run {run_id} --root runs`" in note, at
    assert at > 10


def test_an_encoder_that_another_store_has_is_left_alone(bench, chain):
    def versions():
        return [
            (one.version, one.tags, one.description) for one in bench.client.search_model_versions(f"name = '{tracking.ENCODER}'")
        ]

    before = versions()
    model, dataset = (bench.artifact(kind, "job", "there", "it") for kind in (dsl.Model, dsl.Dataset))
    model.metadata.update(model_id="m-" + "0" * 32)
    dataset.metadata.update(fingerprint=FINGERPRINT)
    run = tracking.StepRun(bench.store, chain["linear-eval"])
    run.encoders.rate(model, dataset, "# Card", 1.0)
    run.close()
    assert versions() == before


def test_deleted_runs_are_not_known(bench):
    pipeline_id = bench.pipeline()
    assert tracking.knows(bench.store, pipeline_id)
    bench.client.delete_run(pipeline_id)
    assert not tracking.knows(bench.store, pipeline_id)
    assert not tracking.knows(bench.store, "0" * 32)


def test_a_store_that_cannot_be_used_is_the_user_s_to_mend(tmp_path):
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
        tracking.open_store("nonsense://somewhere")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI is not set"), tracking.step("pretrain", {}, {}, environ={}):
        pass


def test_telemetry_is_off_before_mlflow_is_imported():
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == os.environ["DO_NOT_TRACK"] == "true"


def test_a_run_shows_the_phase_that_it_is_in_and_keeps_the_one_that_it_failed_in(bench):
    store, shown = bench.store, []
    run_id = store.client.create_run(store.experiment_id).info.run_id
    phase = Phase(store, run_id, seconds_to_last=0.001)
    report = phase.of(lambda *args: shown.append(args))

    def tag() -> str | None:
        return store.client.get_run(run_id).data.tags.get("sogclr.phase")

    for name in ("compiling", "training"):
        report(name, 1, 2, "loss 3")
        while tag() != name:
            time.sleep(0.01)
    assert shown == [("compiling", 1, 2, "loss 3"), ("training", 1, 2, "loss 3")]
    phase.close(finished=False)
    assert tag() == "training"
    phase.close(finished=True)
    assert tag() is None


def test_a_finished_run_shows_no_phase_though_the_server_was_slow_to_take_it(bench, monkeypatch):
    asked, answered = threading.Event(), threading.Event()
    run_id = bench.store.client.create_run(bench.store.experiment_id).info.run_id
    set_tag = MlflowClient.set_tag

    def slowly(self, *args, **more):
        asked.set()
        answered.wait()
        set_tag(self, *args, **more)

    monkeypatch.setattr(MlflowClient, "set_tag", slowly)
    phase = Phase(bench.store, run_id, seconds_to_last=0.001)
    phase.of(lambda *args: None)("training")
    asked.wait()
    phase.close(finished=True)
    answered.set()
    phase.thread.join()
    assert "sogclr.phase" not in bench.store.client.get_run(run_id).data.tags
