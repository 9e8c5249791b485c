"""The cache of a root: finished steps are reused by content, and what cannot be reused drops out."""

import shutil
from pathlib import Path

import pytest
from kfp import dsl

from components import workspace
from pipelines import cache
from pipelines.kfp_cache import StepCache, WriteOnlyCache
from trainer.shared.records import MANIFEST, Manifest, Shard, Split, manifest_to_json


def outputs_of(root, run="run", fingerprint="f" * 64):
    """A whole dataset in a root, as a step's output."""
    folder = root / "kfp" / run / "dataset"
    folder.mkdir(parents=True)
    (folder / "shard").write_bytes(b"1234")
    split = Split(1, (1,), (Shard("shard", 1, 4, "", (0,)),))
    manifest = Manifest("images", fingerprint, ("n1",), {"train": split, "validation": split}, "0")
    (folder / MANIFEST).write_text(manifest_to_json(manifest))
    return {"dataset": dsl.Dataset("dataset", str(folder), {"fingerprint": fingerprint, "run_id": run})}


def key_of(steps, **arguments):
    return steps.compute_key("step", "image", ["code"], arguments)


@pytest.fixture
def steps(tmp_path):
    """The cache of a root, which is in the current folder's parent."""
    return StepCache(str(cache.folder_of(tmp_path / "root")))


def test_a_step_is_found_by_the_content_of_its_inputs_not_by_where_they_are(steps, tmp_path):
    root = tmp_path / "root"
    first, second = outputs_of(root, "first")["dataset"], outputs_of(root, "second")["dataset"]
    other = outputs_of(root, "other", "0" * 64)["dataset"]
    assert key_of(steps, dataset=first, a=1) == key_of(steps, dataset=second, a=1)
    assert key_of(steps, dataset=first, a=1) not in (key_of(steps, dataset=first, a=2), key_of(steps, dataset=other, a=1))
    raw = tmp_path / "raw"
    raw.mkdir()
    (tmp_path / "link").symlink_to(raw)
    assert key_of(steps, raw=str(raw)) == key_of(steps, raw=str(tmp_path / "link")) != key_of(steps, raw=str(tmp_path))


def test_what_the_cache_keeps_is_found_in_a_moved_root(steps, tmp_path):
    root = tmp_path / "root"
    demo = key_of(steps, raw=str(root / "demo-raw"))
    steps.put(demo, outputs_of(root))
    new = root.rename(tmp_path / "new")
    moved = StepCache(str(cache.folder_of(new)))
    assert key_of(moved, raw=str(new / "demo-raw")) == demo
    assert moved.get(demo)["dataset"].uri == str(new / "kfp" / "run" / "dataset")


def test_without_the_cache_nothing_is_reused_and_the_new_outputs_take_the_place_of_the_old(steps, tmp_path):
    root = tmp_path / "root"
    steps.put("key", outputs_of(root, "old"))
    anew = WriteOnlyCache(steps.cache_root)
    assert anew.get("key") is None
    anew.put("key", outputs_of(root, "new"))
    assert steps.get("key")["dataset"].metadata["run_id"] == "new"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda root: (root / "kfp/run/dataset/shard").write_bytes(b"123"), "dataset/shard has 3 bytes, not 4"),
        (lambda root: (root / "kfp/run/dataset/shard").unlink(), "dataset/shard is gone"),
        (lambda root: (root / f"kfp/run/dataset/{MANIFEST}").write_text("{"), f"dataset/{MANIFEST} is gone or torn"),
        (lambda root: shutil.rmtree(root / "kfp"), "dataset is gone"),
        (lambda root: (root / "cache/key.json").write_text(""), "it is empty"),
        (lambda root: (root / "cache/key.json").write_text("{"), "it is torn"),
    ],
    ids=["torn shard", "lost shard", "torn manifest", "lost dataset", "empty entry", "torn entry"],
)
def test_what_cannot_be_reused_drops_out_of_the_cache_with_one_line(steps, tmp_path, spoil, said):
    root = tmp_path / "root"
    steps.put("key", outputs_of(root))
    assert list(cache.drop_unusable(root, lambda run: "")) == []
    spoil(root)
    assert steps.get("key") is None
    (line,) = cache.drop_unusable(root, lambda run: "")
    assert line.startswith("key drops out of the cache: ")
    assert line.endswith(said)
    assert list(cache.drop_unusable(root, lambda run: "")) == []


def test_finished_work_of_another_job_is_gone_on_from_only_if_that_is_wanted(tmp_path):
    first = workspace.claim(str(tmp_path), "first", a=1)
    (Path(first.folder)).mkdir()
    first.release(finished=True)
    assert workspace.claim(str(tmp_path), "second", a=1).folder != first.folder
    third = workspace.claim(str(tmp_path), "third", True, a=1)
    assert (third.folder, third.finished_by) == (first.folder, "first")
    assert workspace.claim(str(tmp_path), "fourth", True, a=1).folder != first.folder
