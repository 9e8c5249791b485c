"""Training with labels on an encoder: what moves, what does not, which images, and that it learns."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from support.datasets import write_dataset

from eval.measure.linear_eval import linear_eval
from eval.measure.subsets import balanced_subset, read_subset
from eval.measure.supervised import Recipe, train_classifier
from trainer.augmentation import one_view
from trainer.config import replace
from trainer.encoder import make_encoder
from trainer.input_pipeline import labelled_batches
from trainer.optimizer import learning_rate
from trainer.presets import resolve
from trainer.reading import find_records
from trainer.sampler import Sampler
from trainer.shared.errors import UserError
from trainer.shared.records import ENCODED, IMAGE_ID, encode_example, parse_example, read_manifest
from trainer.train import train

TINY = ["depth=10", "width_multiplier=0.0625", "image_size=16", "global_batch_size=24", "epochs=1", "warmup_epochs=0"]


def tiny(*overrides: str):
    return resolve("demo", [*TINY, *overrides])


def recipe(**changes) -> Recipe:
    return Recipe(
        **{"num_images": 48, "epochs": 3, "batch_size": 20, "base_learning_rate": 1.0, "seed": 0, "frozen": True, **changes}
    )


def moved(encoder, before: list[np.ndarray]) -> set[str]:
    return {
        variable.path
        for variable, old in zip(encoder.variables, before, strict=True)
        if not np.array_equal(variable.numpy(), old)
    }


def batches_of(config, recipe, dataset, image_ids=None):
    """Returns the batches that training with labels by `recipe` takes."""
    run = replace(config, seed=recipe.seed).run
    return labelled_batches(config.views, recipe.batch_size, run, str(dataset), read_manifest(str(dataset)), image_ids)


def test_nothing_in_a_frozen_encoder_moves(dataset):
    """Not a weight, not a statistic of BN."""
    config = tiny()
    manifest, encoder = read_manifest(str(dataset)), make_encoder(config.encoder, config.views.image_size, config.run.seed)
    before = [variable.numpy() for variable in encoder.variables]
    done = []
    classifier = train_classifier(encoder, config, str(dataset), manifest, recipe(), on_progress=done.append)
    assert moved(encoder, before) == set()
    assert all(np.any(variable.numpy()) for variable in classifier.variables)
    assert done == [20 * step for step in range(48 * 3 // 20 + 2)]


def test_the_classifier_takes_the_steps_that_the_recipe_says(dataset):
    """From zero, Nesterov momentum .9, cosine from the first step on: by the formulas, on features made 16 at a time."""
    config, manifest = tiny("linear_eval.batch_size=16"), read_manifest(str(dataset))
    encoder = make_encoder(config.encoder, config.views.image_size, config.run.seed)
    assert float(learning_rate(recipe().optimizer, 48, tf.constant(0))) == pytest.approx(1.0 * 20 / 256)
    classifier = train_classifier(encoder, config, str(dataset), manifest, recipe())
    weights, velocity, steps = np.zeros((33, 6)), np.zeros((33, 6)), 48 * 3 // 20 + 1
    for step, batch in enumerate(batches_of(config, recipe(), dataset).take(steps)):
        features = encoder(batch["image"].numpy() / np.float32(255), training=False).numpy().astype(np.float64)
        inputs = np.concatenate([features, np.ones((20, 1))], 1)
        odds = np.exp(inputs @ weights)
        wrong = odds / odds.sum(1, keepdims=True) - np.eye(6)[batch["label"].numpy()]
        rate = 20 / 256 * 0.5 * (1 + np.cos(np.pi * step / steps))
        gradient = inputs.T @ wrong / 20
        velocity = 0.9 * velocity + rate * gradient
        weights -= 0.9 * velocity + rate * gradient
    kernel, bias = (variable.numpy() for variable in classifier.variables)
    np.testing.assert_allclose(np.concatenate([kernel, bias[None]]), weights, rtol=1e-3, atol=1e-5)


def test_fine_tuning_moves_all_of_the_encoder_on_the_chosen_images_alone(tmp_path):
    """Records of other images that cannot be decoded are in nobody's way."""
    ids = balanced_subset(np.arange(48) % 6, 0.25, 0)
    bad = lambda split, encoded, label, i: encode_example(encoded if i in ids else b"no picture", label, i)  # noqa: E731
    manifest = write_dataset(tmp_path, example=bad)
    config = tiny()
    encoder = make_encoder(config.encoder, config.views.image_size, config.run.seed)
    before = [variable.numpy() for variable in encoder.variables]
    own = recipe(num_images=len(ids), batch_size=8, frozen=False, base_learning_rate=20.0)
    train_classifier(encoder, config, str(tmp_path), manifest, own, ids)
    # What stands behind a scale that begins at zero gets its first gradient only after that has moved.
    assert moved(encoder, before) == {variable.path for variable in encoder.variables}


def test_an_epoch_has_every_chosen_image_once_and_the_next_another_order_and_other_views(dataset):
    ids = np.array([3, 8, 20, 41])
    few = recipe(num_images=4, batch_size=4)
    batches = list(batches_of(tiny(), few, dataset, ids).take(8))
    assert all(sorted(batch["label"].numpy()) == sorted(ids % 6) for batch in batches)
    assert len({tuple(batch["label"].numpy()) for batch in batches}) > 1
    again = list(batches_of(tiny(), few, dataset, ids).take(8))
    images = [batch["image"].numpy() for batch in batches]
    for one, other in zip(images, again, strict=True):
        np.testing.assert_array_equal(one, other["image"])
    assert len({image.tobytes() for batch in images for image in batch}) == 32


@pytest.mark.parametrize("seed", [0, 7])
def test_a_subset_is_read_in_the_order_that_its_records_had_in_memory(tmp_path, seed):
    """Every third image, over blocks and shards: as if a window held all records, in the order of the shards."""
    manifest, ids, config = write_dataset(tmp_path, train=150), np.arange(0, 150, 3), tiny()
    shards = [str(tmp_path / shard.file) for shard in manifest.splits["train"].shards]
    records = [parse_example(record) for record in tf.data.TFRecordDataset(shards)]
    kept = [record for record in records if int(record[IMAGE_ID]) in ids]
    windows = Sampler((50,), 8, 50, seed).windows(3)
    order = ((int(window["epoch"]), kept[number]) for window in windows for number in window["positions"].numpy())
    size, smallest, how = config.views.image_size, config.views.crop_min_area, config.views.crop_interpolation
    expected = [
        one_view(record[ENCODED], size, smallest, tf.constant(seed * 2**32 + epoch, tf.int64), record[IMAGE_ID], how)
        for epoch, record in itertools.islice(order, 80)
    ]
    run = replace(config, seed=seed).run
    batches = labelled_batches(config.views, 8, run, str(tmp_path), manifest, ids, 3).take(10)
    np.testing.assert_array_equal(np.concatenate([batch["image"] for batch in batches]), np.stack(expected))


def test_of_a_subset_places_are_kept_and_not_images(dataset):
    """32 bytes an image, and the search for them says how far it is."""
    read = []
    extents = find_records(str(dataset), read_manifest(str(dataset)), np.array([3, 9, 40]), read.append)
    assert sum(values.nbytes for values in (extents.shards, extents.offsets, extents.sizes, extents.counts)) == 3 * 32
    assert read == [0, 24, 48]
    serialized = extents.read(tf.range(3, dtype=tf.int64)).numpy()
    assert sorted(int(parse_example(record)[IMAGE_ID]) for record in serialized) == [3, 9, 40]


def test_views_of_an_image_are_flipped_half_of_the_time(dataset):
    """With the whole image as the only crop, a view is one of two."""
    config, ids = tiny("crop_min_area=1", "global_batch_size=2"), np.array([3, 9])
    pair = recipe(num_images=1, batch_size=2, seed=1)
    views = [batch["image"].numpy() for batch in batches_of(config, pair, dataset, ids).take(40)]
    labelled = np.concatenate(views).astype(int)
    first = labelled[0]
    distance = [min(np.abs(view - first).max(), np.abs(view[:, ::-1] - first).max()) for view in labelled]
    same = labelled[np.array(distance) == 0]
    flipped = np.mean([not np.array_equal(view, first) for view in same])
    assert len(same) >= 10
    assert 0.2 < flipped < 0.8


def test_a_subset_is_balanced_reproducible_and_holds_the_smaller_one():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), [200, 150, 100, 100, 100, 100, 100, 100, 47, 3]))
    tenth = balanced_subset(labels, 0.1, 0)
    assert np.bincount(labels[tenth]).tolist() == [10] * 9 + [3]
    assert set(balanced_subset(labels, 0.01, 0)) < set(tenth)
    assert np.bincount(labels[balanced_subset(labels, 1e-9, 0)]).tolist() == [1] * 10
    np.testing.assert_array_equal(balanced_subset(labels, 0.1, 0), tenth)
    assert set(balanced_subset(labels, 0.1, 1)) != set(tenth)


def test_a_published_list_is_read_by_ids_or_by_names(dataset, tmp_path):
    manifest = read_manifest(str(dataset))
    names = [f"n{i // 8:08}_{i % 8}.JPEG" for i in range(48)]
    (tmp_path / "names.txt").write_text("\n".join(np.random.default_rng(0).permutation(names)))
    (tmp_path / "ids.txt").write_text("40\n3\n\n17\n")
    (tmp_path / "list.txt").write_text(f"{names[40]}\ntrain/{names[3]}\n{names[17]}\n")
    for name in ("ids.txt", "list.txt"):
        assert read_subset(str(tmp_path / name), manifest, str(tmp_path / "names.txt")).tolist() == [3, 17, 40]


@pytest.mark.parametrize(
    ("content", "names", "message"),
    [
        ("3\n48", "", "lists image ID 48: training images have the IDs 0..47"),
        ("3\n4\n3", "", "lists image ID 3 twice"),
        ("", "", "lists no images"),
        ("n01_1.JPEG", "", "lists names, but records hold no names: set linear_eval.train_names=FILE"),
        ("n01_1.JPEG", "n02_1.JPEG", "names 1 training images, but the dataset has 48"),
        ("n01_1.JPEG", "\n".join(map(str, range(48))), "lists n01_1.JPEG, which is missing in"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(dataset, tmp_path, content, names, message):
    (tmp_path / "list.txt").write_text(content)
    (tmp_path / "names.txt").write_text(names)
    with pytest.raises(UserError, match=message):
        read_subset(str(tmp_path / "list.txt"), read_manifest(str(dataset)), names and str(tmp_path / "names.txt"))


@pytest.mark.thorough
def test_every_protocol_runs_on_a_checkpoint_of_the_middle_of_a_run(dataset, tmp_path):
    """By its file. Each has its row, its column of predictions and its own settings; the bar ends where it should."""
    import pyarrow.parquet as pq

    train(tiny("global_batch_size=20", "epochs=2", "checkpoint_every_epochs=1"), str(dataset), str(tmp_path / "run"))
    (tmp_path / "ids.txt").write_text("\n".join(map(str, range(12))))
    reported = []
    result = linear_eval(
        str(dataset),
        str(tmp_path / "run" / "checkpoint-00000004.npz"),
        str(tmp_path / "out"),
        [
            "linear_eval.protocols=official,finetune-1,finetune-10,finetune-100",
            "linear_eval.l2_penalties=1e-2",
            *(f"linear_eval.{name}_epochs=2" for name in ("official", "finetune_1", "finetune_10", "finetune_100")),
            f"linear_eval.finetune_10_subset={tmp_path / 'ids.txt'}",
            "linear_eval.finetune_batch_size=10",
        ],
        on_progress=lambda phase, done=0, total=0, text="": reported.append((phase, done, total)),
    )
    rows = {row.protocol: row for row in result.accuracies if row.encoder == "pretrained"}
    assert list(rows) == ["cached", "official", "finetune-1", "finetune-10", "finetune-100"]
    assert pq.read_table(tmp_path / "out" / "predictions.parquet").column_names[2:] == [
        "cached",
        "untrained_cached",
        *list(rows)[1:],
    ]
    assert {name: (row.settings["num_images"], row.settings["batch_size"]) for name, row in list(rows.items())[1:]} == {
        "official": (48, 48),
        "finetune-1": (6, 6),
        "finetune-10": (12, 10),
        "finetune-100": (48, 10),
    }
    assert result.metrics["eval/finetune_10_top_1_accuracy"] == rows["finetune-10"].top_1
    phases = dict.fromkeys(phase for phase, _, _ in reported)
    assert {"features of train, images", "fit", "untrained control, fit", "official, images"} <= set(phases)
    assert {"finetune-10, images", "features of finetune-10, images"} <= set(phases)
    assert list(phases)[:2] == ["checking the dataset", "loading the encoder"]
    assert "finding the images of finetune-10, records" in phases
    names = list(phases)
    passes = ["features of train", "untrained control, features of train", "official", "finetune-10", "features of finetune-10"]
    for one in passes:
        assert names.index(f"{one}, images") == names.index(f"{one}, first batch") + 1
    for phase in phases:
        counts = [(done, total) for name, done, total in reported if name == phase]
        assert [done for done, _ in counts] == sorted(done for done, _ in counts)
        if phase.endswith("images"):
            assert counts[-1][0] == counts[-1][1]
