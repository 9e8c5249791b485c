"""The attempts of a step after one that did its work and was cut before Vertex AI knew: they record, and do nothing twice."""

import json
from pathlib import Path

import pytest
from kfp import dsl
from mlflow import MlflowClient
from support.raw_data import striped_archives

from components import lease, outbox, steps, tracking, variables, workspace
from components.tracking import step_file, step_runs
from components.tracking.datasets import Datasets
from components.tracking.encoders import Encoders
from components.tracking.metrics import Metrics
from components.tracking.recorded import read_step
from trainer.shared.records import MANIFEST

PLACE = "projects/p/locations/europe-west4"
TINY = [
    *("depth=10", "image_size=16", "global_batch_size=12", "epochs=8", "warmup_epochs=0", "width_multiplier=0.125"),
    *("log_every_steps=3", "checkpoint_every_epochs=1"),
]
EVAL = ["linear_eval.l2_penalties=1e-2"]
OUTPUTS = {
    "build-tfrecords": {"dataset": dsl.Dataset},
    "pretrain": {"model": dsl.Model},
    "linear-eval": {"metrics": dsl.Metrics, "report": dsl.HTML},
}


class Killed(BaseException):
    """Ends an attempt in the middle; what it had in hand is lost."""


class Job:
    """A pipeline job whose steps run here, as KFP's executor runs them on a machine of Vertex AI's."""

    def __init__(self, folder, raw, name, overrides=()):
        self.folder, self.raw, self.name, self.overrides = folder, raw, name, [*TINY, *overrides]
        self.client = MlflowClient()
        self.identity = ""
        self.made = {}

    def attempt(self, component):
        """Runs a step in a task of its own, and returns its outputs."""
        number = len(list(self.folder.glob(f"kfp/{self.name}/{component}_*")))
        task = self.folder / "kfp" / self.name / f"{component}_{number}"
        task.mkdir(parents=True)
        uri = str(task) if component != "build-tfrecords" else str(task.with_name("dataset"))
        kinds = OUTPUTS[component]
        outputs = {name: kind(name=name, uri=f"{uri}/{name}", metadata={}) for name, kind in kinds.items()}
        arguments = {
            "build-tfrecords": {"raw": str(self.raw), "raw_identity": self.identity, "data_settings": [], "beam_args": []},
            "pretrain": {"preset": "demo", "overrides": self.overrides, "init_from": "", "init_identity": ""},
            "linear-eval": {"overrides": EVAL},
        }[component]
        inputs = {
            "build-tfrecords": (),
            "pretrain": ("dataset",),
            "linear-eval": ("dataset", "model"),
        }[component]
        given = {name: self.made[name] for name in inputs}
        steps.COMPONENTS[component].python_func(**arguments, code_version="c0de", **given, **outputs)
        self.made |= outputs
        return outputs

    def runs(self, component):
        chosen = f"tags.`sogclr.component` = '{component}' and tags.`mlflow.parentRunId` = '{self.run_id}'"
        return list(self.client.search_runs(["1"], chosen))

    @property
    def run_id(self):
        return tracking.find_job(tracking.open_job_store(), self.name)

    def versions(self):
        return [
            one
            for one in self.client.search_model_versions(f"name = '{tracking.ENCODER}'")
            if one.run_id == self.runs("pretrain")[0].info.run_id
        ]

    def steps_logged(self, component, metric):
        (run,) = self.runs(component)
        return [point.step for point in self.client.get_metric_history(run.info.run_id, metric)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attempts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patch.setenv("AIP_CHECKPOINT_DIR", str(folder / "checkpoints"))
        patch.setenv("SOGCLR_JOB_FOLDER", PLACE)
        patch.delenv("MLFLOW_RUN_ID", raising=False)
        patch.chdir(folder)
        yield folder, striped_archives(folder)


@pytest.fixture(scope="module")
def job(world):
    """A job whose three steps are done."""
    job = Job(*world, "done")
    for component in OUTPUTS:
        job.attempt(component)
    return job


NEVER = {
    "build-tfrecords": "beam_jobs.job.build",
    "pretrain": "trainer.train.train",
    "linear-eval": "eval.measure.linear_eval.linear_eval",
}


@pytest.mark.parametrize("component", OUTPUTS)
def test_an_attempt_after_a_finished_one_fills_kfp_s_outputs_and_does_nothing_again(job, component, monkeypatch, capsys):
    before = {name: (job.made[name].uri, dict(job.made[name].metadata)) for name in OUTPUTS[component]}
    runs, files = job.runs(component), sorted(job.folder.rglob("*"))
    monkeypatch.setattr(NEVER[component], lambda *_, **__: pytest.fail("it was done again"))
    outputs = job.attempt(component)
    assert {name: (one.uri, one.metadata) for name, one in outputs.items()} == before
    assert [run.info.run_id for run in job.runs(component)] == [run.info.run_id for run in runs]
    assert f"{component} was finished by an earlier attempt, as run {runs[0].info.run_id}" in capsys.readouterr().err
    assert [path for path in sorted(job.folder.rglob("*")) if path not in files and "kfp" not in path.parts] == []


def test_a_step_that_mlflow_does_not_know_to_be_finished_though_it_recorded_all_is_finished(job, monkeypatch):
    (run,) = job.runs("pretrain")
    job.client.update_run(run.info.run_id, status="FAILED")
    job.client.set_tag(run.info.run_id, "sogclr.error", "OSError: the machine was taken away")
    monkeypatch.setattr(NEVER["pretrain"], lambda *_, **__: pytest.fail("it was done again"))
    job.attempt("pretrain")
    (run,) = job.runs("pretrain")
    assert run.info.status == "FINISHED"
    assert "sogclr.error" not in run.data.tags


def test_an_upload_that_the_server_carries_out_late_undoes_nothing(world, monkeypatch):
    """A server goes on trying after its client has given up and sent the same again."""
    job = Job(*world, "late")
    uploads, real = [], MlflowClient.log_dict
    monkeypatch.setattr(MlflowClient, "log_dict", lambda *given: [uploads.append(given), real(*given)])
    dataset = job.attempt("build-tfrecords")["dataset"]
    for late in reversed(uploads):
        real(*late)
    (run,) = job.runs("build-tfrecords")
    assert read_step(tracking.open_job_store(), run.info.run_id).outputs["dataset"].metadata == dataset.metadata


def test_a_conversion_that_was_not_recorded_is_taken_as_it_is(world, monkeypatch):
    job = Job(*world, "converted")
    with monkeypatch.context() as patch:
        patch.setattr(Datasets, "log", killed)
        with pytest.raises(Killed):
            job.attempt("build-tfrecords")
    (manifest,) = job.folder.glob(f"kfp/{job.name}/dataset/dataset/{MANIFEST}")
    written = manifest.stat().st_mtime_ns
    dataset = job.attempt("build-tfrecords")["dataset"]
    assert manifest.stat().st_mtime_ns == written
    assert dataset.metadata["fingerprint"] == json.loads(manifest.read_text())["fingerprint"]
    assert [run.info.status for run in job.runs("build-tfrecords")] == ["FINISHED"]


def test_the_next_job_goes_on_from_the_shards_of_an_interrupted_conversion(world, monkeypatch):
    monkeypatch.setenv(variables.DATASETS, str(world[0] / "datasets"))
    monkeypatch.setenv(variables.REUSE, "true")
    interrupted, following = (Job(*world, name) for name in ("interrupted", "following"))
    for job in (interrupted, following):
        job.identity = "of the raw folder"
    with monkeypatch.context() as patch:
        patch.setattr("beam_jobs.job.publish", killed)
        with pytest.raises(Killed):
            interrupted.attempt("build-tfrecords")
    shards = {path: path.stat().st_mtime_ns for path in world[0].rglob("*.tfrecord-*-of-*") if "converted" not in path.parts}
    dataset = following.attempt("build-tfrecords")["dataset"]
    now = {path: path.stat().st_mtime_ns for path in Path(dataset.uri).glob("*.tfrecord-*")}
    assert now
    assert now.items() <= shards.items()


@pytest.mark.parametrize(
    ("of", "where"),
    [(Encoders, "log"), (tracking.StepRun, "log_figure"), (step_file, "complete"), (MlflowClient, "set_terminated")],
    ids=["encoder", "figure", "outputs", "end"],
)
def test_training_that_was_not_recorded_is_recorded_by_the_next_attempt(world, job, of, where, monkeypatch):
    """However it was cut: no step is trained again, and there is one run, one version and one point a step."""
    other = Job(*world, f"trained-{where}")
    other.made = {"dataset": job.made["dataset"]}
    with monkeypatch.context() as patch:
        # As SIGKILL: nothing says that the attempt ended.
        patch.setattr(step_runs, "_record_failure", lambda *_: None)
        patch.setattr(workspace.Claim, "release", lambda *_: None)
        patch.setattr(of, where, killed)
        with pytest.raises(Killed):
            other.attempt("pretrain")
    end_process()
    trained = []
    with monkeypatch.context() as patch:
        patch.setattr("trainer.train.make_train_step", lambda *_: lambda batch: trained.append(batch))
        model = other.attempt("pretrain")["model"]
    assert trained == []
    assert model.metadata["state_sha256"] == job.made["model"].metadata["state_sha256"]
    assert [run.info.status for run in other.runs("pretrain")] == ["FINISHED"]
    assert len(other.versions()) == 1
    steps_logged = other.steps_logged("pretrain", "train/contrastive_loss")
    assert steps_logged == sorted(set(steps_logged))
    assert steps_logged == job.steps_logged("pretrain", "train/contrastive_loss")
    assert Path(model.uri).parent == other.folder / "checkpoints"


@pytest.mark.parametrize(
    ("of", "where"),
    [(Metrics, "log_final"), (Encoders, "rate"), (tracking.StepRun, "log_text")],
    ids=["metrics", "rating", "report"],
)
def test_an_evaluation_that_was_not_recorded_is_recorded_by_the_next_attempt(world, job, of, where, monkeypatch):
    other = Job(*world, f"evaluated-{where}")
    other.made = {name: job.made[name] for name in ("dataset", "model")}
    with monkeypatch.context() as patch:
        patch.setattr(step_runs, "_record_failure", lambda *_: None)
        patch.setattr(workspace.Claim, "release", lambda *_: None)
        patch.setattr(of, where, killed)
        with pytest.raises(Killed):
            other.attempt("linear-eval")
    end_process()
    with monkeypatch.context() as patch:
        patch.setattr("eval.measure.linear_eval._measure", lambda *_: pytest.fail("a protocol ran again"))
        metrics = other.attempt("linear-eval")["metrics"]
    assert metrics.metadata["top_1_accuracy"] == job.made["metrics"].metadata["top_1_accuracy"]
    assert len(other.steps_logged("linear-eval", "eval/top_1_accuracy")) == 1
    assert len(job.versions()) == 1


def test_a_step_whose_folder_another_process_took_over_writes_nothing_more_and_says_so(world, job, monkeypatch):
    other = Job(*world, "taken", ["seed=7"])
    other.made = {"dataset": job.made["dataset"]}
    asked = []

    def require(self):
        asked.append(1)
        if len(asked) == 4:
            left.extend((path, path.stat().st_mtime_ns) for path in files())
            raise lease.LostLeaseError("gs://bucket/lease.json was taken over by jobs/b")

    def files():
        return sorted(path for path in (other.folder / "checkpoints").rglob("*") if path.is_file())

    left = []
    # What is logged is in memory when the folder is lost.
    monkeypatch.setattr(outbox, "_SECONDS_BETWEEN_LOCAL_WRITES", 3600.0)
    monkeypatch.setattr(workspace._Lock, "require", require)
    monkeypatch.setattr(workspace._Lock, "release", lambda *_: None)
    with pytest.raises(lease.LostLeaseError):
        other.attempt("pretrain")
    assert [(path, path.stat().st_mtime_ns) for path in files()] == left
    (run,) = other.runs("pretrain")
    assert run.info.status == "RUNNING", "it may be the next attempt's by now"
    end_process()


def killed(*_, **__):
    raise Killed


def end_process():
    """Gives up the locks of this process, which end with it."""
    while workspace._held:
        workspace._held.pop().close()
