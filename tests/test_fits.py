"""What is fitted to features, and votes of neighbours, against scikit-learn; features on disk."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from eval.measure import logistic, neighbours, parts
from eval.measure.features import Examples, StoredFeatures, read_features
from eval.measure.logistic import cut, fit, fit_path, top_k_accuracy
from eval.measure.protocols import cached
from eval.measure.protocols.cached import fit_with_choice
from eval.measure.protocols.knn import knn_scores
from trainer.settings import LinearEvalSettings
from trainer.shared.errors import UserError


def blobs(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, count)
    centres = np.random.default_rng(9).normal(0, 1.5, (4, 10))
    return (centres[labels] + random.normal(0, 1, (count, 10))).astype(np.float32), labels


def stored(folder: Path, values: np.ndarray, labels: np.ndarray, rows: int = 64) -> StoredFeatures:
    """Features on disk, in parts of `rows`, in an order that is not that of the IDs."""
    order = np.random.default_rng(5).permutation(len(labels))
    starts = range(0, len(labels), rows)
    for number, start in enumerate(starts):
        ids = order[start : start + rows]
        parts.write(parts.path_of(str(folder), number), ids, labels[ids], values[ids], "")
    sizes = tuple(min(rows, len(labels) - start) for start in starts)
    return StoredFeatures(str(folder), "", values.shape[1], sizes)


def test_fit_is_the_optimum_that_scikit_learn_finds():
    values, labels = blobs(300, 0)
    *_, ours = fit_path(Examples.of(values, labels), 4, [1.0, 0.01], tolerance=1e-6)
    standard = (values - values.mean(0)) / values.std(0)
    theirs = LogisticRegression(C=1 / (0.01 * len(values)), tol=1e-8, max_iter=5000).fit(standard, labels)
    np.testing.assert_allclose(ours.weights.T, theirs.coef_, atol=2e-3)
    test, _ = blobs(200, 1)
    agree = ours.logits(test).argmax(1) == theirs.predict((test - values.mean(0)) / values.std(0))
    assert agree.all()


def test_the_penalty_is_chosen_where_it_helps(tmp_path):
    """Where a fifth of the labels is wrong and most features mean nothing, next to no penalty cannot win."""
    random = np.random.default_rng(0)
    truth = random.integers(0, 2, 800)
    labels = np.where(random.random(800) < 0.2, 1 - truth, truth)
    values = np.concatenate([truth[:, None] * 4.0 + random.normal(0, 1, (800, 1)), random.normal(0, 1, (800, 200))], 1)
    settings = LinearEvalSettings(l2_penalties=(1e-8, 0.3), holdout_fraction=0.5)
    chosen = fit_with_choice(stored(tmp_path, values.astype(np.float32), labels), 2, settings)
    assert chosen.l2_penalty == 0.3


def test_a_penalty_that_is_chosen_with_a_part_is_proved_on_all(monkeypatch, tmp_path):
    """With a part the largest is taken; on all images smaller ones are tried, until one is no better."""
    fitted = []

    def watched(examples, num_classes, penalties, *args, **kwargs):
        for one in fit_path(examples, num_classes, penalties, *args, **kwargs):
            fitted.append((examples.count, one.l2_penalty))
            yield one

    with_a_part = {1.0: 0.9, 0.1: 0.8, 0.01: 0.7, 0.001: 0.6}
    with_all = {1.0: 0.5, 0.1: 0.6, 0.01: 0.6, 0.001: 0.9}

    def accuracies(those, examples):
        assert examples.count == 50
        return [(with_all if len(those) == 1 else with_a_part)[one.l2_penalty] for one in those]

    monkeypatch.setattr(cached, "fit_path", watched)
    monkeypatch.setattr(cached, "accuracies", accuracies)
    settings = LinearEvalSettings(l2_penalties=tuple(with_a_part), holdout_fraction=0.25, choice_images=200)
    chosen = fit_with_choice(stored(tmp_path, *blobs(500, 0)), 4, settings)
    assert fitted == [(150, 1.0), (150, 0.1), (150, 0.01), (150, 0.001), (450, 1.0), (450, 0.1), (450, 0.01)]
    assert chosen.l2_penalty == 0.1


def reports_of(run) -> dict[str, list[tuple[int, int, str]]]:
    """Returns (done, total, text) of each report of `run(on_progress)`, by phase."""
    reports: dict[str, list[tuple[int, int, str]]] = {}
    run(lambda phase, done=0, total=0, text="": reports.setdefault(phase, []).append((done, total, text)))
    return reports


def test_a_fit_reports_each_piece_of_a_pass(monkeypatch, tmp_path):
    """A pass over ImageNet's features takes a minute of two cores, and reads 79 pieces."""
    monkeypatch.setattr(logistic, "_ROWS", 50)
    features = stored(tmp_path, *blobs(500, 0))
    settings = LinearEvalSettings(l2_penalties=(0.1, 0.01), holdout_fraction=0.25, choice_images=200)
    reports = reports_of(lambda on_progress: fit_with_choice(features, 4, settings, on_progress=on_progress))
    reports.pop("reading held-out features")
    paths = ("choice of the penalty", "choice of the penalty with all images", "fit")
    assert list(reports) == [phase for path in paths for phase in (f"features for the {path}, images", path)]
    for path in paths:
        done = [one for one, _, _ in reports[f"features for the {path}, images"]]
        assert done[0] == 0
        assert max(np.diff(done)) <= 50
        assert reports[f"features for the {path}, images"][-1][:2] == (done[-1], done[-1])


def test_a_search_says_its_pass_and_its_gradient_but_no_total(monkeypatch, tmp_path):
    """How many passes it takes is known when it ends: the time left was wrong by a factor of 80."""
    monkeypatch.setattr(logistic, "_ROWS", 50)
    features = stored(tmp_path, *blobs(500, 0))
    settings = LinearEvalSettings(l2_penalties=(0.1,))
    fit = reports_of(lambda on_progress: fit_with_choice(features, 4, settings, on_progress=on_progress))["fit"]
    assert {(done, total) for done, total, _ in fit} == {(0, 0)}
    texts = [text for _, _, text in fit]
    assert texts[:2] == ["pass 1, 50 of 500 images", "pass 1, 100 of 500 images"]
    assert texts[10].startswith("pass 2, 50 of 500 images, penalty 0.1, loss ")
    assert texts[10].endswith(" (ends at 5e-04)")
    assert texts[-1].startswith(f"pass {len(texts) // 10}, 500 of 500 images")


def test_a_fit_can_be_stopped_within_a_pass(monkeypatch, tmp_path):
    monkeypatch.setattr(logistic, "_ROWS", 50)
    calls = iter(range(100))

    def stop():
        if next(calls) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fit_with_choice(stored(tmp_path, *blobs(500, 0)), 4, LinearEvalSettings(l2_penalties=(0.1,)), stop=stop)


def test_neighbours_report_each_block_of_queries(monkeypatch, tmp_path):
    """A piece of the training images takes two minutes of two cores with ImageNet's 50,000 queries."""
    monkeypatch.setattr(neighbours, "_BANK_AT_ONCE", 50)
    monkeypatch.setattr(neighbours, "_QUERIES_AT_ONCE", 30)
    done = []
    neighbours.nearest_neighbours(stored(tmp_path, *blobs(100, 0)), blobs(90, 1)[0], 3, on_progress=done.append)
    np.testing.assert_allclose(done, np.arange(1, 7) / 6)


def test_top_k_counts_labels_among_the_largest_and_ties_against():
    logits = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0, 1.0, 1.0]])
    labels = np.array([0, 0, 1])
    assert top_k_accuracy(logits, labels, 1) == pytest.approx(1 / 3)
    assert top_k_accuracy(logits, labels, 2) == pytest.approx(1 / 3)
    assert top_k_accuracy(logits, labels, 3) == 1.0


@pytest.mark.parametrize("k", [1, 7, 300])
def test_neighbours_vote_as_scikit_learn_has_them_vote(k, monkeypatch, tmp_path):
    """In pieces too small to hold all of them."""
    monkeypatch.setattr(neighbours, "_BANK_AT_ONCE", 50)
    monkeypatch.setattr(neighbours, "_QUERIES_AT_ONCE", 30)
    values, labels = blobs(300, 0)
    queries, _ = blobs(100, 1)
    scores = knn_scores(stored(tmp_path, values, labels), queries, 4, k, 0.07)
    theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = theirs.fit(values.astype(np.float64), labels).predict_proba(queries.astype(np.float64))
    np.testing.assert_allclose(scores / scores.sum(1, keepdims=True), expected, atol=1e-4)


def test_a_small_temperature_does_not_overflow(tmp_path):
    values, labels = blobs(300, 0)
    scores = knn_scores(stored(tmp_path, values, labels), values, 4, 20, 0.001)
    np.testing.assert_array_equal(scores.argmax(1), labels)


def test_a_fit_that_reads_its_features_at_every_pass_is_that_of_one_that_holds_them(monkeypatch, tmp_path):
    values, labels = blobs(300, 0)
    held = fit(stored(tmp_path, values, labels).examples(), 4, 0.01, tolerance=1e-6)
    monkeypatch.setattr(logistic, "HELD_BYTES", 0)
    monkeypatch.setattr(logistic, "_ROWS", 70)
    read = fit(stored(tmp_path, values, labels).examples(), 4, 0.01, tolerance=1e-6)
    np.testing.assert_allclose(read.weights, held.weights, atol=1e-3)
    np.testing.assert_allclose(read.mean, values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(read.deviation, values.std(0), rtol=1e-5)


def test_features_that_hardly_differ_are_told_apart():
    """Of a feature that is 1000 plus little, the little counts."""
    values, labels = blobs(300, 0)
    ours = fit(Examples.of((values / 100 + 1000).astype(np.float32), labels), 4, 0.01)
    accuracy = np.mean(ours.logits((values / 100 + 1000).astype(np.float32)).argmax(1) == labels)
    expected = fit(Examples.of(values, labels), 4, 0.01)
    assert accuracy == pytest.approx(np.mean(expected.logits(values).argmax(1) == labels), abs=0.01)


def test_pieces_are_cut_anew_without_loss():
    pieces = [np.arange(start, stop) for start, stop in ((0, 3), (3, 3), (3, 20), (20, 21))]
    found = [piece for (piece,) in cut(((piece,) for piece in pieces), 4)]
    assert [len(piece) for piece in found] == [4, 4, 4, 4, 4, 1]
    np.testing.assert_array_equal(np.concatenate(found), np.arange(21))


def test_features_come_back_as_they_were_written(tmp_path):
    values, labels = blobs(1000, 0)
    features = stored(tmp_path, values, labels)
    whole = features.whole()
    np.testing.assert_array_equal(whole.values, values)
    np.testing.assert_array_equal(whole.labels, labels)
    np.testing.assert_array_equal(features.labels_by_id(), labels)
    wanted = labels == 2
    chosen = [piece for piece, of in features.examples(wanted).pieces() if np.all(of == 2)]
    assert sum(map(len, chosen)) == features.examples(wanted).count == wanted.sum()
    part = pq.read_table(tmp_path / "part-00003.parquet")
    assert part.column_names == ["image_id", "label", "features"]
    assert str(part.schema.field("features").type) == "fixed_size_list<element: float>[10]"


def test_what_holds_no_features_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a folder of features"):
        read_features(str(tmp_path))
    (tmp_path / "features.json").write_text('{"digest": "", "dimensions": 10, "rows": [3]}')
    for content in (b"something else", b""):
        (tmp_path / "part-00000.parquet").write_bytes(content)
        with pytest.raises(UserError, match="is not a part of features"):
            read_features(str(tmp_path)).whole()
    parts.write(str(tmp_path / "part-00000.parquet"), np.arange(2), np.arange(2), np.zeros((2, 10), "f"), "")
    with pytest.raises(UserError, match=r"has 2 images, but features\.json says 3: delete"):
        list(read_features(str(tmp_path)).parts())
