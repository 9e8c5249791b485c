"""The same bytes whatever runs the job, how often and however it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from apache_beam.portability.api import beam_runner_api_pb2
from support.raw_data import OF_VALIDATION, TRAIN, contents, picture

from beam_jobs import build_tfrecords, convert, files
from beam_jobs.job import build
from beam_jobs.layouts.layout import RawImage
from beam_jobs.plan import make_plan
from beam_jobs.publish import CONVERSION
from beam_jobs.raw import SPLITS
from beam_jobs.references import ReferenceTable, pack_images
from trainer.shared import files as shared
from trainer.shared.errors import UserError
from trainer.shared.records import MANIFEST, manifest_from_json, read_manifest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def references(raw, tmp_path_factory) -> dict[int, dict[str, bytes]]:
    """By number of shards, what one process writes."""
    written = {}
    for num_shards in (8, 13):
        folder = tmp_path_factory.mktemp("reference") / "output"
        build(str(raw), str(folder), num_shards=num_shards)
        written[num_shards] = contents(folder)
    return written


def fingerprint(written: dict[str, bytes]) -> str:
    return manifest_from_json(written[MANIFEST].decode()).fingerprint


@pytest.mark.parametrize("num_shards", [8, 13])
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_write_the_bytes_of_one(processes, num_shards, raw, references, tmp_path):
    build(str(raw), str(tmp_path / "output"), num_shards=num_shards, processes=processes)
    assert contents(tmp_path / "output") == references[num_shards]


def test_a_runner_of_beam_writes_the_bytes_of_one_process(raw, references, tmp_path):
    build(str(raw), str(tmp_path / "output"), num_shards=8, beam_args=["--runner=FnApiRunner"])
    assert contents(tmp_path / "output") == references[8]


@pytest.mark.parametrize("more", [[], ["--processes", "2"], ["--dry-run"]])
def test_beam_is_imported_for_a_runner_only(more, raw, tmp_path):
    """Importing Beam takes longer than converting 10,000 images."""
    code = f"""
import sys
from beam_jobs.build_tfrecords import main
for _ in range(2):
    assert main(["--raw", {str(raw)!r}, "--output", {str(tmp_path / "output")!r}, *{more!r}]) == 0
sys.exit([name for name in sys.modules if name.startswith("apache_beam")][:1] or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_references_to_images_take_at_most_100_bytes_each():
    """In objects they took 860 bytes: 12 GB for 14 million images."""
    names = [f"n01440764.tar/n01440764_{number}.JPEG" for number in range(20_000)]
    for images in (
        [RawImage(name, 7, TRAIN, 512 * number, 1000 + number) for number, name in enumerate(names)],
        [RawImage("", 7, f"train/{name}", 0, 1000 + number) for number, name in enumerate(names)],
    ):
        packed = pack_images(images)
        tracemalloc.start()
        table = ReferenceTable.joined([ReferenceTable.of(packed[:7]), ReferenceTable.of([]), ReferenceTable.of(packed[7:])])
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert held / len(images) <= 100
        assert list(table.take(np.arange(len(images)))) == packed
        assert list(table.take(np.array([9, 0, 19_999]))) == [packed[9], packed[0], packed[19_999]]


def test_the_fingerprint_is_that_of_any_number_of_shards(references, built):
    assert {fingerprint(written) for written in references.values()} == {read_manifest(str(built)).fingerprint}


@pytest.mark.thorough
def test_dask_writes_the_bytes_of_one_process(raw, references, tmp_path):
    """Both numbers of shards on one cluster, in a process of its own: Dask's workers import the main module anew."""
    code = f"""
import sys
from beam_jobs.build_tfrecords import main
if __name__ == "__main__":
    from dask.distributed import LocalCluster
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        for shards in ("8", "13"):
            code = main(["--raw", {str(raw)!r}, "--output", {str(tmp_path)!r} + "/" + shards, "--num-shards", shards,
                         "--runner=DaskRunner", "--dask_client_address=" + cluster.scheduler_address])
            assert code == 0
"""
    script = tmp_path / "on_dask.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    for num_shards, reference in references.items():
        assert contents(tmp_path / str(num_shards)) == reference


@pytest.mark.thorough
def test_twenty_runs_in_three_processes_are_all_exact(raw, references, tmp_path):
    for number in range(20):
        build(str(raw), str(tmp_path / str(number)), num_shards=8, processes=3)
        assert contents(tmp_path / str(number)) == references[8], f"run {number}"


# ---- Interrupted


KILL = """
import os, signal, sys
from beam_jobs.job import build
from trainer.shared import files

raw, root, moments = sys.argv[1], sys.argv[2], [int(moment) for moment in sys.argv[3].split(",")]
create = files._create
for number, moment in enumerate(moments):
    for when in (("before", "after")[number % 2],):
        child = os.fork()
        if not child:
            created = 0

            def dying(path):
                global created
                created += 1
                if created == moment and when == "before":
                    os.kill(os.getpid(), signal.SIGKILL)
                file = create(path)
                if created >= moment:
                    file.write(b"half of it")
                    file.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
                return file

            files._create = dying
            build(raw, f"{root}/{moment}-{when}", num_shards=8)
            os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), f"not killed at {moment}"
"""
IDENTITY, ARCHIVES, SHARDS, METADATA = 1, 4, 16, 3
"""Files that a job of 8 shards a split writes, a report for each shard beside."""
MOMENTS = (1, 2, 5, 6, 7, 14, 37, 38, IDENTITY + ARCHIVES + 2 * SHARDS + METADATA + 1)


@pytest.mark.thorough
def test_killed_at_any_moment_and_given_again_the_job_writes_the_same_bytes(raw, references, tmp_path):
    script = [sys.executable, "-c", KILL, str(raw), str(tmp_path), ",".join(map(str, MOMENTS))]
    done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    left = sorted(tmp_path.iterdir())
    assert len(left) == len(MOMENTS)  # the first moment leaves an empty folder
    for output in left:
        assert not (output / MANIFEST).exists()
        build(str(raw), str(output), num_shards=8)
        assert contents(output) == references[8], output.name


def die(_: object) -> None:
    raise SystemError("the power went")


def interrupted(raw: Path, output: Path, monkeypatch, **options) -> None:
    """Leaves what a job leaves that ends when all shards are written and nothing is published."""
    with monkeypatch.context() as patch:
        patch.setattr(convert, "publish", die)
        with pytest.raises(SystemError, match="the power went"):
            build(str(raw), str(output), **options)
    assert not (output / MANIFEST).exists()


def test_finished_shards_are_proven_and_kept_and_damaged_ones_written_again(raw, references, tmp_path, monkeypatch):
    output = tmp_path / "out[put]*"
    interrupted(raw, output, monkeypatch, num_shards=8)
    written = sorted(output.glob("*.tfrecord-*"))
    assert len(written) == 16
    damaged, gone = written[3], written[5]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    gone.unlink()
    (output / f"images-train.tfrecord-00002-of-00008.{'0' * 32}.tmp").write_bytes(b"half")
    before = {path: path.stat().st_ino for path in written if path.exists()}
    build(str(raw), str(output), num_shards=8)
    assert contents(output) == references[8]
    assert {path for path, inode in before.items() if path.stat().st_ino != inode} == {damaged}


@pytest.mark.parametrize("changed", [{"num_shards": 8, "images_per_class": 20}, {"num_shards": 5}])
def test_an_interrupted_job_of_another_kind_is_not_gone_on_with(changed, raw, references, tmp_path, monkeypatch):
    output = tmp_path / "output"
    interrupted(raw, output, monkeypatch, **changed)
    build(str(raw), str(output), num_shards=8)
    assert contents(output) == references[8]


def test_raw_data_that_changed_meanwhile_is_read_again(raw, references, tmp_path, monkeypatch):
    copy = tmp_path / "raw"
    copy.mkdir()
    for path in raw.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / OF_VALIDATION).write_text("n01000001\n" * 20)
    output = tmp_path / "output"
    interrupted(copy, output, monkeypatch, num_shards=8)
    (copy / OF_VALIDATION).write_bytes((raw / OF_VALIDATION).read_bytes())
    build(str(copy), str(output), num_shards=8)
    assert contents(output) == references[8]


def test_a_job_that_ended_between_manifest_and_clearing_up_is_finished_by_the_next(raw, references, tmp_path, monkeypatch):
    output = tmp_path / "output"
    with monkeypatch.context() as patch:
        patch.setattr(files, "delete_folder", lambda folder: None)
        build(str(raw), str(output), num_shards=8)
    assert (output / ".building").is_dir()
    build(str(raw), str(output), num_shards=8)
    assert contents(output) == references[8]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_job_that_is_told_to_end_keeps_finished_shards(raw, references, tmp_path, number):
    """The signal comes when some shards are written, in the main thread, where Beam makes an error of it."""
    code = f"""
import os, signal, sys
from beam_jobs.build_tfrecords import main
from trainer.shared import files
create, shards = files._create, []
def creating(path):
    shards.extend([path] if "tfrecord" in path else [])
    if len(shards) == 6:
        os.kill(os.getpid(), {int(number)})
    return create(path)
files._create = creating
sys.exit(main(["--raw", {str(raw)!r}, "--output", {str(tmp_path / "output")!r}, "--num-shards", "8"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[number], done.stderr
    assert re.search("(terminated|interrupted); the same .* goes on from the shards that are finished\n$", done.stderr)
    assert "Traceback" not in done.stderr
    written = {path: path.stat().st_ino for path in (tmp_path / "output").glob("*.tfrecord-*") if path.suffix != ".tmp"}
    assert written
    assert not (tmp_path / "output" / "manifest.json").exists()
    build(str(raw), str(tmp_path / "output"), num_shards=8)
    assert contents(tmp_path / "output") == references[8]
    assert {path: path.stat().st_ino for path in written} == written


def test_no_worker_outlives_a_killed_job(raw, tmp_path):
    code = f"""
import os, signal
from beam_jobs import convert
from beam_jobs.job import build
def stuck(*arguments):
    os.write(1, b"%d\\n" % os.getpid())  # two workers' prints could mix
    import time
    while True: time.sleep(60)
convert.write_references = stuck
build({str(raw)!r}, {str(tmp_path / "output")!r}, num_shards=4, processes=2)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    workers = [int(process.stdout.readline()) for _ in range(2)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Where one does, the test ends when pytest's own limit is reached.
    while any(map(is_alive, workers)):
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_work_item_done_twice_at_a_time_leaves_one_whole_shard(raw, references, tmp_path):
    plan = make_plan(str(raw), str(tmp_path / "output"), num_shards=8)
    indexed = [convert.index_archive(number, plan) for number in range(len(plan.raw.archives))]
    counts = dict(map(convert.count_images, indexed))
    groups: dict[tuple[str, str], list] = {}
    for one in indexed:
        for key, of_shard in convert.assign_ids(one, plan, counts):
            groups.setdefault(key, []).extend(of_shard)
    assert {split for split, _ in groups} == set(SPLITS)
    with ThreadPoolExecutor(4) as pool:
        tasks = [
            pool.submit(convert.write_references, plan, split, file, list(of_shard))
            for (split, file), of_shard in groups.items()
            for _ in range(3)
        ]
        for task in tasks:
            task.result()
        for task in [pool.submit(convert.publish_written, None, plan) for _ in range(1)]:
            task.result()
    assert contents(tmp_path / "output") == references[8]
    assert convert.publish_written((None, []), plan) == fingerprint(references[8])


# ---- No room


def test_a_full_disk_is_one_line_and_what_is_finished_stays(raw, references, tmp_path, monkeypatch):
    output = tmp_path / "output"
    create = shared._create

    def full(path):
        return open("/dev/full", "wb") if "train.tfrecord-00005" in path else create(path)

    for processes in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(shared, "_create", full)
            with pytest.raises(UserError, match="No space left on device; make room and start the same command again") as caught:
                build(str(raw), str(output), num_shards=8, processes=processes)
        assert "\n" not in str(caught.value)
        assert "while running" not in str(caught.value)
        assert list(output.glob("*.tfrecord-*-of-00008"))
    build(str(raw), str(output), num_shards=8)
    assert contents(output) == references[8]


# ---- Cloud Storage and Dataflow


@pytest.mark.thorough
def test_gs_to_gs_gives_the_same_bytes_by_ranged_reads(raw, references, bucket, monkeypatch):
    from google.cloud.storage import Blob

    for path in raw.iterdir():
        bucket.blob(f"raw/{path.name}").upload_from_filename(str(path))
    asked: list[int] = []
    download = Blob.download_as_bytes

    def counting(blob, *arguments, **keywords):
        asked.append(keywords["end"] - keywords["start"])
        return download(blob, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Blob, "download_as_bytes", counting)
        content = files.read_range("gs://bucket/raw/" + TRAIN, 5000, 3000)
    assert content == (raw / TRAIN).read_bytes()[5000:8000]
    assert asked == [3000]
    build("gs://bucket/raw", "gs://bucket/out/1.0.0", name="images", num_shards=8)
    written = {blob.name.removeprefix("out/1.0.0/"): blob.download_as_bytes() for blob in bucket.list_blobs(prefix="out/")}
    assert written.pop(CONVERSION)
    assert all(written.pop(f"images-{split}-sources.jsonl.gz") for split in SPLITS)
    assert written == references[8]
    assert build("gs://bucket/raw", "gs://bucket/out/1.0.0", name="images", num_shards=8).fingerprint == fingerprint(written)
    with pytest.raises(UserError, match="a finished dataset"):
        build("gs://bucket/raw", "gs://bucket/out/1.0.0", name="images", num_shards=5)


@pytest.mark.thorough
def test_a_folder_in_cloud_storage_is_counted_as_one_here(bucket, tmp_path):
    names = ["train/a/1.JPEG", "train/a/more/2.JPEG", "train/b/3.JPEG", "train/b/Thumbs.db", "train/.git/x", "val/a/4.JPEG"]
    for number, name in enumerate(names):
        (tmp_path / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / name).write_bytes(picture(number))
        bucket.blob(f"raw/{name}").upload_from_filename(str(tmp_path / "raw" / name))
    for folder in ("train/a/", "train/b/nothing/"):  # as Cloud Storage's console makes folders
        bucket.blob(f"raw/{folder}").upload_from_string(b"")
    (tmp_path / "raw" / "train" / "b" / "nothing").mkdir()
    manifest = build("gs://bucket/raw", str(tmp_path / "of bucket"))
    assert manifest == build(str(tmp_path / "raw"), str(tmp_path / "output"))
    assert manifest.splits["train"].seen.entries == 6
    bucket.blob("raw/train/empty/").upload_from_string(b"")
    with pytest.raises(UserError, match="train/empty is empty"):
        build("gs://bucket/raw", str(tmp_path / "other"))


def dataflow(*more: str) -> list[str]:
    return [
        "--runner=DataflowRunner",
        "--project=project",
        "--region=us-central1",
        "--temp_location=gs://bucket/temp",
        "--sdk_container_image=registry/sogclr:1",
        "--sdk_location=container",
        *more,
    ]


def test_dataflow_is_given_a_template_of_references_only(raw, bucket, tmp_path, capsys):
    template = tmp_path / "template.json"
    arguments = ["--raw", str(raw), "--output", "gs://bucket/out", "--num-shards", "8"]
    code = build_tfrecords.main([*arguments, *dataflow(f"--template_location={template}")])
    assert code == 0, capsys.readouterr().err
    assert "nothing was converted" in capsys.readouterr().out
    job = json.loads(template.read_text())
    assert job["type"] == "JOB_TYPE_BATCH"
    assert "registry/sogclr:1" in template.read_text()
    (staged,) = [blob for blob in bucket.list_blobs(prefix="temp/") if blob.name.endswith("pipeline.pb")]
    pipeline = beam_runner_api_pb2.Pipeline.FromString(staged.download_as_bytes())
    assert_has_all_steps(pipeline)
    assert pipeline.ByteSize() < 100_000  # the plan and the code's names; Dataflow takes 10 MB
    assert not list(bucket.list_blobs(prefix="out/"))


def assert_has_all_steps(pipeline: beam_runner_api_pb2.Pipeline) -> None:
    names = {transform.unique_name for transform in pipeline.components.transforms.values()}
    for step in ("IndexHeaders", "CountImages", "AssignIDs", "GroupByShard", "WriteShards", "WaitForAll", "VerifyAndPublish"):
        assert any(step in name for name in names), step


def test_dataflow_builds_the_job_of_all_steps_without_running_it(raw, bucket, capsys, monkeypatch):
    from apache_beam.runners.dataflow import dataflow_runner

    seen = []
    run = dataflow_runner.DataflowRunner.run_pipeline

    def running(self, pipeline, options, *arguments, **keywords):
        result = run(self, pipeline, options, *arguments, **keywords)
        seen.append(self.proto_pipeline)
        return result

    monkeypatch.setattr(dataflow_runner.DataflowRunner, "run_pipeline", running)
    arguments = ["--raw", str(raw), "--output", "gs://bucket/out"]
    assert build_tfrecords.main([*arguments, *dataflow("--dry_run=True")]) == 0, capsys.readouterr().err
    (proto,) = seen
    assert_has_all_steps(proto)
    assert not list(bucket.list_blobs(prefix="out/"))


def test_processes_of_this_machine_go_with_no_other_runner(raw, tmp_path):
    with pytest.raises(UserError, match="--processes is for this machine"):
        build(str(raw), str(tmp_path / "output"), processes=2, beam_args=["--runner=DaskRunner"])
    with pytest.raises(UserError, match="processes=0"):
        build(str(raw), str(tmp_path / "output"), processes=0)
    assert not (tmp_path / "output").exists()
    assert os.listdir(tmp_path) == []
