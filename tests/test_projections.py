"""Projections of two views of every training image: each once, the same views for every run, resumed after a stop."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from eval.measure import features as storing
from eval.measure.projections import load_head, make_head, projected_views, views_digest
from trainer.augmentation import augment
from trainer.checkpoint import Checkpoint
from trainer.encoder import make_encoder
from trainer.input_pipeline import PADDING, training_batches, view_batches
from trainer.preemption import PreemptedError
from trainer.presets import resolve
from trainer.shared.errors import UserError
from trainer.shared.records import read_manifest
from trainer.state import model_variables

TINY = ["depth=10", "width_multiplier=0.0625", "image_size=16", "projection_dim=8", "linear_eval.batch_size=7"]


@pytest.fixture(scope="module")
def manifest(dataset):
    return read_manifest(str(dataset))


@pytest.fixture(scope="module")
def encoder():
    config = resolve("demo", TINY)
    return make_encoder(config.encoder, config.views.image_size, 0)


def views_by_id(dataset, manifest, batch_size: int = 7, seed: int = 0, **how) -> dict[int, bytes]:
    """Returns pixels and draws of each image, by ID."""
    found: dict[int, bytes] = {}
    for batch in view_batches(resolve("demo", TINY).views, seed, str(dataset), manifest, batch_size, **how):
        assert batch["views"].shape == (batch_size, 2, 16, 16, 3)
        for image_id, views, draws in zip(*(batch[name].numpy() for name in ("image_id", "views", "draws")), strict=True):
            if image_id != PADDING:
                assert image_id not in found
                found[int(image_id)] = views.tobytes() + draws.tobytes()
    return found


def test_every_image_has_two_views_once_whatever_the_batch_and_the_number_of_hosts(dataset, manifest):
    views = views_by_id(dataset, manifest)
    assert sorted(views) == list(range(48))
    assert views_by_id(dataset, manifest, batch_size=20) == views
    parts = [views_by_id(dataset, manifest, host=host, hosts=2) for host in range(2)]
    assert parts[0] | parts[1] == views
    assert not parts[0].keys() & parts[1].keys()
    later = views_by_id(dataset, manifest, first_step=5)
    assert len(later) == 48 - 35
    assert later.items() <= views.items()
    few = views_by_id(dataset, manifest, image_ids=np.array([3, 40]))
    assert few == {image_id: views[image_id] for image_id in (3, 40)}


def test_the_views_are_those_of_their_seed_and_of_no_epoch_of_training(dataset, manifest):
    views = views_by_id(dataset, manifest)
    assert not views.items() & views_by_id(dataset, manifest, seed=1).items()
    config = resolve("demo", [*TINY, "global_batch_size=24"])
    for batch in training_batches(config, str(dataset), manifest, 0).take(4):
        for image_id, pixels, draws in zip(*(batch[name].numpy() for name in ("image_id", "views", "draws")), strict=True):
            assert pixels.tobytes() + draws.tobytes() != views[int(image_id)]


def test_projections_are_in_the_order_of_image_ids_for_every_image(dataset, manifest, encoder, tmp_path):
    config = resolve("demo", TINY)
    head = make_head(config)
    done: list[int] = []
    found = projected_views(encoder, head, config, str(dataset), manifest, str(tmp_path), on_progress=done.append)
    assert (found.shape, found.dtype) == ((48, 2, 8), np.float32)
    assert done == [0, 7, 14, 21, 28, 35, 42, 48]
    for batch in view_batches(config.views, 0, str(dataset), manifest, 24):
        for view in (0, 1):
            images = augment(
                batch["views"][:, view], batch["draws"][:, view], config.views.color_jitter_strength, config.views.blur
            )
            expected = head(encoder(images, training=False), training=False)
            np.testing.assert_allclose(found[batch["image_id"], view], expected, rtol=1e-4, atol=1e-5)


def test_an_interrupted_pass_goes_on_after_its_last_part_and_a_finished_one_is_read(
    dataset, manifest, encoder, tmp_path, monkeypatch
):
    monkeypatch.setattr(storing, "PART_BYTES", 1)
    config = resolve("demo", TINY)
    head = make_head(config)

    def project(folder: str, stop_after: int = 100, config=config):
        done: list[int] = []
        how = {"on_progress": done.append, "should_stop": lambda: len(done) > stop_after}
        return projected_views(encoder, head, config, str(dataset), manifest, str(tmp_path / folder), **how), done

    whole, _ = project("alone")
    with pytest.raises(PreemptedError, match="kept the projections of 21 of 48 images of train"):
        project("stopped", stop_after=3)
    again, done = project("stopped")
    assert done == [21, 28, 35, 42, 48]
    np.testing.assert_array_equal(again, whole)
    assert project("stopped")[1] == [48]
    same = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=5))
    assert project("stopped", config=same)[1] == [48], "the seed of a run changes no view"
    other, done = project("stopped", config=resolve("demo", [*TINY, "linear_eval.seed=1"]))
    assert done[0] == 0
    assert not np.allclose(other, whole)


def test_views_are_told_apart_by_everything_that_they_depend_on():
    changes = [
        "linear_eval.seed=1",
        "color_jitter_strength=0.45",
        "crop_min_area=0.21",
        "blur=true",
        "blur=false",
        "image_size=17",
    ]
    digests = [views_digest(resolve("demo", [*TINY, change])) for change in changes]
    assert len(set(digests)) == len(digests)
    same = resolve("demo", [*TINY, "eval_crop_proportion=0.9", "temperature=0.3", "seed=4", "linear_eval.batch_size=9"])
    assert views_digest(same) == views_digest(resolve("demo", TINY))


def test_a_checkpoint_without_projection_head_is_refused():
    config = resolve("demo", TINY)
    arrays = {name: variable.numpy() for name, variable in model_variables("projection", make_head(config)).items()}
    stored = Checkpoint(3, arrays, {}, path="somewhere")
    head = load_head(config, stored)
    values = tf.random.stateless_normal([4, config.encoder.feature_dim], [0, 0])
    np.testing.assert_array_equal(head(values), make_head(config)(values))
    with pytest.raises(UserError, match="somewhere has no projection head: take a checkpoint of a pretraining run"):
        load_head(config, Checkpoint(3, {}, {}, path="somewhere"))
