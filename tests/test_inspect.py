"""The page of a dataset: what it shows, and that it sees what is wrong."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from support.browser import browsing, needs_chromium
from support.raw_data import SYNSETS, expected, raw_as_usual, read_records, train_images

from beam_jobs import inspect_dataset
from beam_jobs.job import build
from trainer.shared.errors import UserError
from trainer.shared.records import decode_example, read_manifest


def test_a_whole_dataset_has_no_problems(built):
    for full in (False, True):
        found = inspect_dataset.inspect(str(built), full=full)
        assert found.problems == ()
        assert found.statistics["train"].images == 150
        assert found.statistics["train"].width == (20, 20, 20, 20)
        assert found.statistics["train"].height == (24, 24, 24, 24)
        assert found.statistics["train"].grey == 0.2


def test_the_page_shows_counts_classes_sizes_and_pictures(built):
    page = inspect_dataset.page(str(built))
    manifest = read_manifest(str(built))
    assert manifest.fingerprint in page
    assert '<td>train</td><td class="number">150</td><td class="number">2</td>' in page
    for synset in SYNSETS:
        assert f"<title>{synset}: 50</title>" in page
    pictures = re.findall(r'"data:image/jpeg;base64,([\w+/=]+)" alt="an image of class (\w+)"', page)
    assert [synset for _, synset in pictures] == [synset for synset in SYNSETS for _ in range(8)]
    for encoded, _ in pictures:
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
            assert picture.size == (20, 24)
    assert "src=" not in page.replace('src="data:', "")  # needs no other file


@needs_chromium
def test_a_browser_shows_the_page_light_and_dark_and_asks_no_host_for_anything(built, tmp_path):
    page = tmp_path / "dataset.html"
    page.write_text(inspect_dataset.page(str(built)))
    (tmp_path / "browser").mkdir()
    ground = "getComputedStyle(document.body).backgroundColor"
    with browsing(tmp_path / "browser") as browser:
        browser.open(page)
        assert browser.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert browser.evaluate("[...document.querySelectorAll('rect')].every(bar => bar.getBoundingClientRect().height > 50)")
        assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        grounds = []
        for scheme in ("light", "dark"):
            browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            grounds.append(browser.evaluate(ground))
        assert grounds[0] != grounds[1]
        assert browser.complaints == []
        assert [url for url in browser.requests if not url.startswith(("data:", page.as_uri()))] == []
        assert browser.asked == []


def test_pictures_stand_with_their_class(built):
    manifest = read_manifest(str(built))
    of_class = {synset: {content for one, content in expected("train") if one == synset} for synset in SYNSETS}
    for label, shown in inspect_dataset._images_by_class(str(built), manifest, "train", range(3)):
        assert len(shown) == len(set(shown)) == 8
        assert set(shown) <= of_class[SYNSETS[label]]


def test_repaired_and_left_out_images_are_listed(tmp_path):
    train = train_images(5)
    out = io.BytesIO()
    Image.new("RGB", (9, 9)).save(out, "png")
    train[SYNSETS[0]] |= {"other.JPEG": out.getvalue(), "<gone>.JPEG": b"", "Thumbs.db": b"x"}
    build(str(raw_as_usual(tmp_path / "raw", train=train)), str(tmp_path / "output"), on_bad_image="skip")
    page = inspect_dataset.page(str(tmp_path / "output"))
    assert "n01000001.tar/other.JPEG</td><td>PNG RGB to JPEG RGB" in page
    assert "n01000001.tar/&lt;gone&gt;.JPEG</td><td>is empty" in page
    assert "n01000001.tar/Thumbs.db</td><td>1 left by a file manager" in page


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def change_manifest(folder, change):
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    (folder / "manifest.json").write_text(json.dumps(content))


FILE = "images-train.tfrecord-00001-of-00002"


@pytest.mark.parametrize(
    ("spoil", "says", "only_full"),
    [
        (lambda folder: (folder / FILE).unlink(), f"{FILE} is missing", False),
        (lambda folder: (folder / FILE).write_bytes(b"short"), f"{FILE} has 5 bytes", False),
        (lambda folder: flip(folder / FILE, 3000), f"{FILE} has the checksum", True),
        (lambda folder: flip(folder / FILE, 3000), f"{FILE} is damaged: the record at byte", False),
        (lambda folder: (folder / "dataset_info.json").unlink(), "dataset_info.json is missing", False),
        (
            lambda folder: change_manifest(folder, lambda manifest: manifest.update(fingerprint="0" * 64)),
            "the records have the fingerprint",
            True,
        ),
        (
            lambda folder: change_manifest(folder, lambda m: m["splits"]["train"].update(records_per_class=[49, 51, 50])),
            "the labels of train",
            True,
        ),
        (
            lambda folder: change_manifest(folder, lambda m: m["splits"]["train"].update(records=151)),
            "add up to another number",
            False,
        ),
    ],
)
def test_what_is_wrong_is_seen(spoil, says, only_full, built, tmp_path):
    folder = tmp_path / "dataset"
    shutil.copytree(built, folder)
    spoil(folder)
    found = inspect_dataset.inspect(str(folder), full=only_full)
    assert any(says in problem for problem in found.problems), found.problems
    assert says in inspect_dataset.to_html(found)


def test_the_command_writes_the_page_and_says_whether_all_is_well(built, tmp_path, capsys):
    assert inspect_dataset.main([str(built), "--full", "--output", str(tmp_path / "page.html")]) == 0
    assert "whole: every byte is as it was written" in capsys.readouterr().out
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    shutil.copytree(built, tmp_path / "dataset")
    flip(tmp_path / "dataset" / FILE, 3000)
    assert inspect_dataset.main([str(tmp_path / "dataset"), "--full", "--output", str(tmp_path / "page.html"), "--json"]) == 1
    assert FILE in json.loads(capsys.readouterr().out)["problems"][0]
    assert inspect_dataset.main([str(tmp_path)]) == 2
    assert "holds no finished dataset" in capsys.readouterr().err


def test_the_old_name_of_the_command_names_the_new_one_and_runs_it(built, tmp_path):
    command = [sys.executable, "-m", "beam_jobs.inspect", str(built), "--output", str(tmp_path / "page.html")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    said = [line for line in done.stderr.splitlines() if not line.startswith("[inspect] ")]
    assert said == ["warning: python -m beam_jobs.inspect is now python -m beam_jobs.inspect_dataset"]
    assert (tmp_path / "page.html").exists()


def test_records_come_back_as_they_were_encoded(built):
    image_id, label, encoded = read_records(built, "train")[0]
    from trainer.shared.records import encode_example

    assert decode_example(encode_example(encoded, label, image_id)) == (encoded, label, image_id)
    for damaged in (b"", b"\n\x02ab", encode_example(encoded, label, image_id)[:-1]):
        with pytest.raises(ValueError, match="not a record"):
            decode_example(damaged)


def test_what_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no finished dataset"):
        inspect_dataset.inspect(str(tmp_path))


def test_the_component_leaves_the_page_in_mlflow(raw, tmp_path, monkeypatch):
    from kfp import dsl
    from mlflow import MlflowClient

    from components import steps, tracking

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    store = tracking.open_store(uri, artifacts=str(tmp_path / "artifacts"))
    run_id = tracking.start_pipeline(store, "run", command=["sogclr"], root=str(tmp_path), code_version="1", params={})
    for name, value in {"MLFLOW_TRACKING_URI": uri, "MLFLOW_RUN_ID": run_id}.items():
        monkeypatch.setenv(name, value)
    dataset = dsl.Dataset(name="dataset", uri=str(tmp_path / "job" / "task" / "dataset"), metadata={})
    given = {"raw": str(raw), "raw_identity": "1", "data_settings": ["data.images_per_class=40.0"], "beam_args": []}
    steps.build_tfrecords.python_func(**given, code_version="1", dataset=dataset)
    client = MlflowClient(uri)
    page = client.download_artifacts(dataset.metadata["run_id"], "dataset.html", str(tmp_path))
    assert dataset.metadata["fingerprint"] in Path(page).read_text()


def test_a_full_inspection_says_few_lines_and_keeps_at_most_100_bytes_an_image(built, tmp_path, monkeypatch, capsys):
    """Of 2,200 shards each had a line; in objects, an image took 315 bytes."""
    monkeypatch.chdir(tmp_path)
    assert inspect_dataset.main([str(built), "--full"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in said] == [
        "[inspect] listing the dataset ...",
        "[inspect] reading shards, MB",
        "[inspect] reading shards, MB",
        "[inspect] drawing the page ...",
    ]
    assert inspect_dataset._SEEN.itemsize <= 100
