"""The augmentation: each operation against its formula, evaluation and blur against the official code."""

import io
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from trainer.augmentation import (
    DRAWS,
    NUM_DRAWS,
    augment,
    gaussian_blur,
    jitter,
    random_box,
    resize_center,
    resize_crop,
    two_views,
)

GOLDENS = Path(__file__).parent / "goldens"


def noise(count: int, side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def draws_of(count: int, **values) -> np.ndarray:
    """Draws that leave an image alone, but for the operations named."""
    draws = np.zeros((count, NUM_DRAWS), np.float32)
    draws[:, [DRAWS.flip, DRAWS.jitter, DRAWS.grey, DRAWS.blur]] = 0.99
    draws[:, [DRAWS.brightness, DRAWS.contrast, DRAWS.saturation, DRAWS.hue]] = 0.5
    draws[:, DRAWS.order : DRAWS.order + 4] = [0.1, 0.2, 0.3, 0.4]
    for name, value in values.items():
        draws[:, getattr(DRAWS, name)] = value
    return draws


@pytest.mark.parametrize("case", range(3))
def test_evaluation_crop_agrees_with_the_official_code(case):
    golden = np.load(GOLDENS / "images.npz")
    ours = resize_center(tf.constant(golden[f"{case}_image"]), int(golden[f"{case}_size"]), 0.875)
    np.testing.assert_allclose(ours, golden[f"{case}_eval"], atol=1e-5)


@pytest.mark.parametrize("case", range(3))
def test_blur_agrees_with_the_official_code(case):
    golden = np.load(GOLDENS / "images.npz")
    images, sigma = tf.constant(golden[f"{case}_blur_in"])[None], tf.constant([float(golden[f"{case}_blur_sigma"])])
    ours = gaussian_blur(images, int(golden[f"{case}_blur_kernel_size"]), sigma, tf.constant([True]))
    np.testing.assert_allclose(ours[0], golden[f"{case}_blur"], atol=1e-5)


def test_an_image_that_no_draw_touches_stays_as_it_is():
    views = noise(2, 20)
    np.testing.assert_allclose(augment(views, draws_of(2), 1.0, True), views / 255.0, atol=1e-6)


def test_flip_and_grey_are_those_of_the_draws():
    views = noise(1, 20)
    np.testing.assert_allclose(augment(views, draws_of(1, flip=0.0), 1.0, False), views[:, :, ::-1] / 255.0, atol=1e-6)
    grey = augment(views, draws_of(1, grey=0.0), 1.0, False).numpy()
    luma = views / 255.0 @ np.array([0.2989, 0.587, 0.114])
    np.testing.assert_allclose(grey, np.repeat(luma[..., None], 3, -1), atol=1e-4)


def jittered(image, draws):
    planes = jitter([tf.constant(image[None, ..., channel]) for channel in range(3)], tf.constant(draws), 1.0)
    return tf.stack(planes, axis=-1)[0]


@pytest.mark.parametrize("draw", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_jitter_agrees_with_tensorflows_own_operation(name, draw):
    image = noise(1, 16, seed=1)[0] / np.float32(255)
    ours = jittered(image, draws_of(1, **{name: draw}))
    factor = 0.2 + 1.6 * draw
    expected = {
        "brightness": lambda: image * factor,
        "contrast": lambda: tf.image.adjust_contrast(image, factor),
        "saturation": lambda: tf.image.adjust_saturation(image, factor),
        "hue": lambda: tf.image.adjust_hue(image, 0.2 * (2 * draw - 1)),
    }[name]()
    np.testing.assert_allclose(ours, np.clip(expected, 0, 1), atol=2e-5)


def test_jitter_applies_its_operations_in_the_order_drawn():
    image = noise(1, 16, seed=2)[0] / np.float32(255)
    draws = draws_of(1, brightness=0.9, contrast=0.1)
    brightness_first = np.clip(tf.image.adjust_contrast(np.clip(image * 1.64, 0, 1), 0.36), 0, 1)
    np.testing.assert_allclose(jittered(image, draws), brightness_first, atol=2e-5)
    draws[:, DRAWS.order : DRAWS.order + 2] = [0.2, 0.1]
    contrast_first = np.clip(np.clip(tf.image.adjust_contrast(image, 0.36), 0, 1) * 1.64, 0, 1)
    np.testing.assert_allclose(jittered(image, draws), contrast_first, atol=2e-5)


def test_operations_are_as_frequent_as_published():
    draws = np.random.default_rng(0).random((4000, NUM_DRAWS), np.float32)
    views = np.tile(np.array([[[200, 40, 90]], [[10, 220, 60]]], np.uint8).repeat(2, 1), (4000, 1, 1, 1))
    out = augment(views, draws, 1.0, False).numpy()
    grey = np.all(np.abs(out - out.mean(-1, keepdims=True)) < 1e-4, axis=(1, 2, 3))
    untouched = np.all(np.abs(out - views / 255.0) < 1e-5, axis=(1, 2, 3))
    assert abs(grey.mean() - 0.2) < 0.03
    assert abs(untouched.mean() - 0.8 * 0.2) < 0.03


def jpeg(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    gradient = np.stack([*np.meshgrid(np.arange(width), np.arange(height)), np.zeros((height, width))], -1)
    Image.fromarray(gradient.astype(np.uint8)).save(buffer, "jpeg", quality=95)
    return buffer.getvalue()


def test_crops_have_the_published_areas_and_aspects():
    shape = tf.constant([200, 240, 3])
    boxes = np.array([random_box(shape, 0.08, tf.constant([7, i], tf.int64)) for i in range(1000)])
    top, left, height, width = boxes.T
    assert np.all(top >= 0)
    assert np.all(left >= 0)
    assert np.all(top + height <= 200)
    assert np.all(left + width <= 240)
    areas, aspects = height * width / (200 * 240), width / height
    assert 0.07 < areas.min() < 0.12
    assert areas.max() > 0.9
    # TensorFlow's operation, which SimCLR uses, draws the height uniformly: P(area < .3) is above .37, for what does not fit.
    assert 0.37 < np.mean(areas < 0.3) < 0.5
    assert 0.73 < aspects.min() < 0.8
    assert 1.25 < aspects.max() < 1.36


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_view_is_the_crop_of_the_whole_image_resized(interpolation):
    """Decoding only what both crops see changes nothing."""
    encoded = jpeg(150, 200)
    key, image_id = tf.constant(3, tf.int64), tf.constant(8, tf.int64)
    views, _ = two_views(encoded, 32, 0.08, key, image_id, interpolation)
    whole = tf.io.decode_jpeg(encoded, channels=3)
    for purpose, view in enumerate(views):
        box = random_box(tf.shape(whole), 0.08, tf.stack([key, 3 * image_id + purpose]))
        np.testing.assert_allclose(view, tf.cast(resize_crop(whole, box, 32, interpolation), tf.float32), atol=1)


def test_a_resized_crop_agrees_with_its_formula():
    """Bilinear between pixel centres, in float64."""
    image = noise(1, 20, seed=4)[0]
    box = np.array([3, 5, 11, 13])
    ours = resize_crop(tf.constant(image), tf.constant(box, tf.int32), 8, "bilinear").numpy()
    crop = image[3:14, 5:18].astype(np.float64)

    def at(side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        centre = np.clip((np.arange(8) + 0.5) * side / 8 - 0.5, 0, side - 1)
        low = np.floor(centre).astype(int)
        return low, np.minimum(low + 1, side - 1), centre - low

    (y0, y1, dy), (x0, x1, dx) = at(11), at(13)
    dy, dx = dy[:, None, None], dx[None, :, None]
    rows = crop[y0] * (1 - dy) + crop[y1] * dy
    np.testing.assert_allclose(ours, rows[:, x0] * (1 - dx) + rows[:, x1] * dx, atol=0.51)


def test_views_are_a_function_of_epoch_and_image_alone():
    encoded = jpeg(60, 80)

    def views(epoch: int, image_id: int) -> tuple:
        return two_views(encoded, 24, 0.2, tf.constant(epoch, tf.int64), tf.constant(image_id, tf.int64))

    first = views(1, 5)
    for a, b in zip(first, views(1, 5), strict=True):
        np.testing.assert_array_equal(a, b)
    crops = [first[0][0], first[0][1], *views(1, 6)[0], *views(2, 5)[0]]
    assert len({crop.numpy().tobytes() for crop in crops}) == len(crops)
    assert first[0].dtype == tf.uint8
