"""The report of a run and the comparison of several: what they say, and that a real browser shows it and asks for nothing."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.browser import browsing, needs_chromium
from support.datasets import write_dataset

from eval.measure.evaluation import read_evaluation
from eval.measure.linear_eval import linear_eval
from eval.show import figures, pictures
from eval.show.comparison import as_dict, as_text, compare, read_candidate, to_html
from eval.show.report import write_report
from trainer import checkpoint as checkpoints
from trainer import config as configs
from trainer.config import Config
from trainer.shared import records
from trainer.shared.errors import UserError
from trainer.shared.records import read_manifest
from trainer.train import train

TINY = configs.replace(
    Config(),
    image_size=16,
    depth=10,
    width_multiplier=0.125,
    cifar_stem=True,
    global_batch_size=12,
    epochs=4,
    warmup_epochs=0.0,
    optimizer="momentum",
    base_learning_rate=0.03,
    temperature=0.3,
    log_every_steps=3,
)
RUNS = {"sogclr": TINY, "simclr": configs.replace(TINY, loss="nt_xent")}
MINE = {"build-tfrecords": "a" * 32, "pretrain": "b" * 32, "linear-eval": "c" * 32}


@pytest.fixture(scope="module")
def evaluated(dataset, tmp_path_factory):
    """Real runs by name: the folder of the evaluation, and the history of the training."""
    done = {}
    for name, config in RUNS.items():
        folder, history = tmp_path_factory.mktemp(name), {}

        def log(metrics, step, history=history):
            for key, value in metrics.items():
                history.setdefault(key, []).append((step, value))

        train(config, str(dataset), f"{folder}/checkpoints", preset="demo", code_version="abc", log_metrics=log)
        linear_eval(str(dataset), f"{folder}/checkpoints", f"{folder}/eval", ["linear_eval.l2_penalties=1e-2"])
        done[name] = f"{folder}/eval", history
    return done


@pytest.fixture(scope="module")
def pages(dataset, evaluated, tmp_path_factory):
    """The page of each run, and of the two compared."""
    folder = tmp_path_factory.mktemp("pages")
    for name, (evaluation, history) in evaluated.items():
        write_report(f"{folder}/{name}.html", evaluation, str(dataset), history=history, runs=MINE)
    (folder / "compared.html").write_text(to_html(compare(candidates(evaluated))))
    return {file.stem: file for file in folder.glob("*.html")}


def candidates(evaluated):
    ids = {"sogclr": "1" * 32, "simclr": "2" * 32}
    return [read_candidate(ids[name], folder, history) for name, (folder, history) in evaluated.items()]


def sections(page):
    return re.findall(r'<section id="([\w-]+)">', page.read_text())


def test_pictures_are_found_by_image_id_wherever_their_records_lie(dataset, built):
    for folder in (dataset, built):  # the first is in an order that is not the conversion's
        manifest = read_manifest(str(folder))
        for split, of_split in manifest.splits.items():
            found = pictures.read_jpegs(str(folder), manifest, split, range(of_split.records))
            assert sorted(found) == list(range(of_split.records))
            some = pictures.read_jpegs(str(folder), manifest, split, [3, 1])
            assert some == {image_id: found[image_id] for image_id in (1, 3)}


def test_only_the_blocks_that_hold_the_wanted_pictures_are_read(built, monkeypatch):
    manifest = read_manifest(str(built))
    blocks = sum(len(shard.blocks) for shard in manifest.splits["train"].shards)
    read, whole = [], pictures._read_block
    monkeypatch.setattr(pictures, "_read_block", lambda *arguments: read.append(arguments) or whole(*arguments))
    pictures.read_jpegs(str(built), manifest, "train", [7])
    assert blocks > len(read) == 1


def test_an_image_that_no_shard_has_is_named(tmp_path):
    def without_5(split, encoded, label, image_id):
        return records.encode_example(encoded, label, 0 if image_id == 5 else image_id)

    manifest = write_dataset(tmp_path, train=12, validation=6, example=without_5)
    with pytest.raises(UserError, match="has no image ID 5 in split train"):
        pictures.read_jpegs(str(tmp_path), manifest, "train", [4, 5])


def test_views_are_those_that_training_makes(dataset):
    from trainer.augmentation import augment
    from trainer.input_pipeline import training_batches

    manifest = read_manifest(str(dataset))
    batch = next(iter(training_batches(TINY, str(dataset), manifest, 0)))
    ids = batch["image_id"].numpy().tolist()
    jpegs = pictures.read_jpegs(str(dataset), manifest, "train", ids)
    made = pictures.views([(image_id, jpegs[image_id]) for image_id in ids], TINY, epoch=0)
    # Not compiled, which takes longer than all else here.
    seen = augment.python_function(
        batch["views"][:, 0], batch["draws"][:, 0], TINY.views.color_jitter_strength, TINY.views.blur
    ).numpy()
    np.testing.assert_allclose(made[:, 0], seen, atol=1e-6)


def test_the_report_says_what_was_measured_and_on_what(dataset, evaluated, pages):
    text = pages["sogclr"].read_text()
    result = json.loads(Path(evaluated["sogclr"][0], "result.json").read_text())
    for row in result["accuracies"]:
        low, high = row["top_1_interval"]
        for said in (row["protocol"], f"{row['top_1']:.1%}", f"{100 * low:.1f} to {100 * high:.1f}%"):
            assert said in text
    state = checkpoints.sha256_of(checkpoints.load(result["checkpoint"]).arrays)
    for said in (state, read_manifest(str(dataset)).fingerprint, *MINE.values(), "image_size=16", "Published for demo: none"):
        assert said in text
    assert "temperature=0.3" not in text  # as the preset has it
    assert str(dataset) not in text  # whoever gets the page has no such folder
    assert len(text) < 5e6


def test_the_largest_and_the_smallest_u_are_shown(evaluated, pages):
    result = json.loads(Path(evaluated["sogclr"][0], "result.json").read_text())
    u = checkpoints.load(result["checkpoint"]).arrays["u"]
    text = pages["sogclr"].read_text()
    for image_id in (np.argmax(u), np.argmin(u)):
        assert f"training image {image_id} with u = {u[image_id]:.4g}" in text


def test_what_a_run_lacks_is_left_out(pages, evaluated, dataset, tmp_path):
    everything = ["accuracies", "training", "u", "views", "neighbours", "map", "classes", "provenance"]
    assert sections(pages["sogclr"]) == everything
    assert sections(pages["simclr"]) == [one for one in everything if one != "u"]
    for path in (one := tmp_path / "eval").parent, one:
        path.mkdir(exist_ok=True)
    before = Path(evaluated["simclr"][0])
    (one / "predictions.parquet").write_bytes((before / "predictions.parquet").read_bytes())
    # As if the features were deleted.
    (one / "result.json").write_text((before / "result.json").read_text().replace(str(before), str(tmp_path / "nowhere")))
    write_report(str(tmp_path / "bare.html"), str(one), str(dataset))
    assert sections(tmp_path / "bare.html") == ["accuracies", "views", "classes", "provenance"]
    for folder in before.glob("features-*"):
        shutil.copytree(folder, one / folder.name)
    write_report(str(tmp_path / "moved.html"), str(one), str(dataset))
    assert sections(tmp_path / "moved.html") == ["accuracies", "views", "neighbours", "map", "classes", "provenance"]


@pytest.mark.parametrize("name", ["sogclr", "simclr", "compared"])
def test_a_page_names_nothing_outside_of_itself(pages, name):
    text = pages[name].read_text()
    named = re.findall(r"""(?:src|href)="([^"]*)"|url\(['"]?([^)'"]*)""", text)
    assert len(named) > 4
    assert [one for pair in named for one in pair if one and not one.startswith(("data:", "#"))] == []
    assert "<script" not in text


def test_the_same_run_has_the_same_page(evaluated, dataset, pages, tmp_path):
    folder, history = evaluated["sogclr"]
    again = write_report(str(tmp_path / "again.html"), folder, str(dataset), history=history, runs=MINE)
    assert again.html == pages["sogclr"].read_text()
    assert {"curves.png", "u.png", "confusion.png", "per_class_accuracy.png", "accuracies.png"} == set(again.figures)


def test_an_evaluation_without_predictions_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"result\.json is missing"):
        read_evaluation(str(tmp_path))
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(UserError, match="sogclr rerun linear-eval makes it anew"):
        read_evaluation(str(tmp_path))


def test_charts_of_many_classes_and_of_classes_without_images_are_drawn():
    accuracy, names = np.linspace(0, 1, 200), [f"n{i:08}" for i in range(200)]
    accuracy[3] = np.nan
    for figure in (figures.per_class_accuracy(accuracy, names), figures.confusion(np.eye(200, dtype=np.int64), names)):
        text = figures.svg(figure, 'says "so" & <so>')
        assert 'aria-label="says &quot;so&quot; &amp; &lt;so>"' in text
        assert "n00000000" not in text  # names of 200 classes could not be read


# ---- Comparison


def test_runs_are_compared_by_protocol_on_the_same_images(evaluated):
    found = compare(candidates(evaluated))
    assert list(found.runs) == ["11111111 loss=global_contrastive", "22222222 loss=nt_xent"]
    assert list(found.differences) == ["loss"]
    rows = {name: json.loads(Path(folder, "result.json").read_text())["accuracies"] for name, (folder, _) in evaluated.items()}
    top_1 = {
        (name, row["protocol"]): row["top_1"] for name, of_run in rows.items() for row in of_run if row["encoder"] == "pretrained"
    }
    assert {pair.protocol for pair in found.pairs} == set(found.protocols) >= {"cached", "knn"}
    for pair in found.pairs:
        expected = top_1["sogclr", pair.protocol] - top_1["simclr", pair.protocol]
        assert pair.test.difference == pytest.approx(expected)
        assert pair.corrected_p_value == pair.test.p_value
    said = "\n".join(as_text(found))
    assert "loss" in said
    assert f"{top_1['sogclr', 'knn']:.1%}" in said
    assert json.loads(json.dumps(as_dict(found)))["runs"]["22222222 loss=nt_xent"]["run_id"] == "2" * 32


def test_runs_on_other_images_are_not_tested_but_said_to_be_apart(evaluated):
    first, second = candidates(evaluated)
    other = replace(second.evaluation, result={**second.evaluation.result, "dataset_fingerprint": "other"})
    found = compare([first, replace(second, evaluation=other)])
    assert found.pairs == []
    assert "evaluated on different datasets: no paired test" in "\n".join(as_text(found))
    assert "evaluated on different datasets: no paired test" in to_html(found)


def test_runs_that_differ_in_nothing_but_their_seed_have_a_mean(evaluated):
    first, _ = candidates(evaluated)
    seeds = [replace(first, run_id=str(i) * 32, settings={**first.settings, "seed": i}) for i in range(3)]
    found = compare(seeds)
    (one,) = [one for (protocol, _), one in found.seeds.items() if protocol == "cached"]
    assert (one.count, one.mean) == (3, pytest.approx(first.evaluation.headline.top_1))
    assert "3 seeds" in "\n".join(as_text(found))


def test_p_values_are_corrected_for_the_number_of_pairs(evaluated):
    first, _ = candidates(evaluated)
    labels = np.zeros(100, np.int64)
    wrong = {"a": 0, "b": 8, "c": 20}

    def of(name, count):
        predictions = np.where(np.arange(100) < count, 1, 0)
        evaluation = replace(first.evaluation, labels=labels, predictions={"cached": predictions})
        return replace(first, run_id=name * 32, evaluation=evaluation)

    found = compare([of(name, count) for name, count in wrong.items()])
    raw = {(pair.first[0], pair.second[0]): pair.test.p_value for pair in found.pairs}
    corrected = {(pair.first[0], pair.second[0]): pair.corrected_p_value for pair in found.pairs}
    smallest, middle, largest = sorted(raw, key=raw.get)
    assert corrected[smallest] == pytest.approx(3 * raw[smallest])
    assert corrected[middle] == pytest.approx(2 * raw[middle])
    assert corrected[largest] == pytest.approx(max(raw[largest], 2 * raw[middle]))


def test_a_run_is_not_compared_with_itself(evaluated):
    first, _ = candidates(evaluated)
    for runs in ([first], [first, first]):
        with pytest.raises(UserError, match="two runs or more, each once"):
            compare(runs)


# ---- In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("browser")) as one:
        yield one


@needs_chromium
@pytest.mark.parametrize("name", ["sogclr", "simclr", "compared"])
def test_a_browser_shows_the_page_and_asks_no_host_for_anything(browser, pages, name):
    browser.open(pages[name])
    assert re.search(r"\d+\.\d% top-1|2 runs compared", browser.evaluate("document.title"))
    assert browser.evaluate("[...document.querySelectorAll('section')].map(s => s.id)") == sections(pages[name])
    assert all(browser.evaluate("[...document.querySelectorAll('section')].map(s => s.getBoundingClientRect().height > 100)"))
    assert all(browser.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 0)"))
    assert (browser.evaluate("document.images.length") > 40) == (name != "compared")
    assert browser.evaluate("[...document.images].every(image => image.alt.length > 5)")
    assert browser.evaluate("[...document.querySelectorAll('svg')].every(one => one.getAttribute('aria-label'))")
    assert browser.evaluate("document.scripts.length") == 0
    # No part of it is wider than the window.
    assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.complaints == []
    assert [url for url in browser.requests if not url.startswith(("data:", pages[name].as_uri()))] == []
    assert browser.asked == []


@needs_chromium
def test_the_map_shows_the_picture_of_every_image(browser, pages):
    browser.open(pages["sogclr"])
    found = browser.evaluate(
        """(async () => {
            const marks = [...document.querySelectorAll('.map > *')], first = document.querySelector('.map b');
            const sheet = new Image();
            sheet.src = getComputedStyle(first).backgroundImage.slice(5, -2);
            await sheet.decode();
            return [marks.length, sheet.naturalWidth, marks.every(mark => mark.title.includes('predicted'))];
        })()"""
    )
    assert found == [17, 17 * 48, True]


@needs_chromium
def test_the_page_is_dark_for_who_has_it_so_and_light_on_paper(browser, pages):
    browser.open(pages["sogclr"])
    ground = "getComputedStyle(document.body).backgroundColor"
    line = "getComputedStyle(document.querySelector('.chart svg text')).fill"
    shown = {}
    for scheme in ("light", "dark"):
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        shown[scheme] = browser.evaluate(ground), browser.evaluate(line)
    browser.call("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert browser.evaluate(ground) == shown["light"][0] == "rgb(255, 255, 255)"
    browser.call("Emulation.setEmulatedMedia", media="", features=[])
    assert shown["light"][0] != shown["dark"][0]
    assert shown["light"][1] != shown["dark"][1]


@needs_chromium
def test_the_browser_would_have_told_of_a_request(browser, tmp_path):
    page = tmp_path / "asking.html"
    page.write_text('<title>asks</title><img src="http://elsewhere.invalid/picture.png"><script>console.error("so")</script>')
    browser.open(page)
    assert "http://elsewhere.invalid/picture.png" in browser.requests
    assert any("elsewhere.invalid" in line for line in browser.asked)
    assert any("so" in complaint for complaint in browser.complaints)
    browser.asked.clear()
