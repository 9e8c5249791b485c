"""SimCLR's augmentation, divided between the host and the accelerator.

The host decodes an image once and makes two random resized crops of it, uint8. The accelerator flips, jitters, greys and blurs a
whole batch of views inside the train step. The host draws all random numbers, keyed by (seed, epoch, image ID). A view carries
the numbers that `augment` uses, so the train step has no random state.
"""

from typing import NamedTuple

import tensorflow as tf


class Draws(NamedTuple):
    """The index of each operation's random number in a view's draws, [NUM_DRAWS] float32, uniform in [0, 1)."""

    flip: int = 0
    jitter: int = 1
    brightness: int = 2
    contrast: int = 3
    saturation: int = 4
    hue: int = 5
    order: int = 6
    """First of four draws, whose ranks are the order of brightness, contrast, saturation and hue."""
    grey: int = 10
    blur: int = 11
    sigma: int = 12


Planes = list[tf.Tensor]
"""The three channels of a batch of images, [n, S, S] float32 each. Separate, because stacking them costs a pass over memory."""

DRAWS = Draws()
NUM_DRAWS = 13


def two_views(
    encoded: tf.Tensor, size: int, min_area: float, epoch_key: tf.Tensor, image_id: tf.Tensor, interpolation: str = "bilinear"
) -> tuple[tf.Tensor, tf.Tensor]:
    """Crops two views of a JPEG on the host, and decodes the area that contains both only once.

    `encoded` is a string scalar; `epoch_key` and `image_id`, int64 scalars, are the key of the random numbers. Returns the views,
    [2, size, size, 3] uint8, and their draws, [2, NUM_DRAWS] float32 in [0, 1). A crop covers a fraction of the image's area from
    `min_area` to 1, at an aspect ratio of 3/4 to 4/3 (Szegedy et al. 2015). `interpolation` is `bilinear` or `bicubic`.
    """
    shape = tf.io.extract_jpeg_shape(encoded)
    keys = [tf.stack([epoch_key, 3 * image_id + purpose]) for purpose in range(3)]
    boxes = [random_box(shape, min_area, key) for key in keys[:2]]
    begin = tf.minimum(boxes[0][:2], boxes[1][:2])
    end = tf.maximum(boxes[0][:2] + boxes[0][2:], boxes[1][:2] + boxes[1][2:])
    image = tf.image.decode_and_crop_jpeg(encoded, tf.concat([begin, end - begin], axis=0), channels=3)
    views = [resize_crop(image, tf.concat([box[:2] - begin, box[2:]], axis=0), size, interpolation) for box in boxes]
    draws = tf.random.stateless_uniform([2, NUM_DRAWS], keys[2], alg="philox")
    return tf.stack(views), draws


def one_view(
    encoded: tf.Tensor, size: int, min_area: float, epoch_key: tf.Tensor, image_id: tf.Tensor, interpolation: str = "bilinear"
) -> tf.Tensor:
    """Crops one view of a JPEG on the host and flips it with probability .5: the whole augmentation of supervised training.

    The arguments are those of `two_views`. Returns [size, size, 3] uint8.
    """
    crop_key, flip_key = (tf.stack([epoch_key, 2 * image_id + purpose]) for purpose in range(2))
    box = random_box(tf.io.extract_jpeg_shape(encoded), min_area, crop_key)
    crop = tf.image.decode_and_crop_jpeg(encoded, box, channels=3)
    view = resize_crop(crop, tf.concat([[0, 0], box[2:]], axis=0), size, interpolation)
    return tf.where(tf.random.stateless_uniform([], flip_key, alg="philox") < 0.5, view[:, ::-1], view)


def random_box(shape: tf.Tensor, min_area: float, key: tf.Tensor) -> tf.Tensor:
    """Returns the box of a random crop, [4] int32: top, left, height and width. `shape` is the image's, [3] int32."""
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        shape,
        tf.zeros([1, 0, 4]),
        seed=key,
        min_object_covered=0.0,
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(min_area, 1.0),
        max_attempts=100,
        use_image_if_no_bounding_boxes=True,
    )
    return tf.concat([begin[:2], extent[:2]], axis=0)


def resize_crop(image: tf.Tensor, box: tf.Tensor, size: int, interpolation: str) -> tf.Tensor:
    """Crops `image`, [H, W, 3] uint8, to `box` (top, left, height, width) and resizes it to [size, size, 3] uint8."""
    crop = tf.slice(image, tf.concat([box[:2], [0]], axis=0), tf.concat([box[2:], [3]], axis=0))
    resized = tf.image.resize(crop, [size, size], method=interpolation)
    if interpolation == "bicubic":  # bicubic interpolation overshoots
        resized = tf.clip_by_value(resized, 0.0, 255.0)
    return tf.cast(resized + 0.5, tf.uint8)


def central_crop(encoded: tf.Tensor, size: int, proportion: float) -> tf.Tensor:
    """Returns the evaluation crop of a JPEG, [size, size, 3] uint8: the central square, resized bicubically."""
    return tf.cast(resize_center(tf.io.decode_jpeg(encoded, channels=3), size, proportion) * 255.0 + 0.5, tf.uint8)


def as_floats(pixels: tf.Tensor) -> tf.Tensor:
    """Converts uint8 pixels to float32 in [0, 1], the encoder's input."""
    return tf.cast(pixels, tf.float32) / 255.0


def resize_center(image: tf.Tensor, size: int, proportion: float) -> tf.Tensor:
    """Crops `image`, [H, W, 3] uint8, to its central square and resizes it to [size, size, 3] float32 in [0, 1].

    The side of the square is `proportion` of the image's shorter side. Resizing is bicubic, as in the official code.
    """
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    side = tf.cast(tf.round(proportion * tf.cast(tf.minimum(height, width), tf.float32)), tf.int32)
    top, left = (height - side + 1) // 2, (width - side + 1) // 2
    middle = tf.image.convert_image_dtype(image[top : top + side, left : left + side], tf.float32)
    return tf.clip_by_value(tf.image.resize(middle, [size, size], method="bicubic"), 0.0, 1.0)


@tf.function(jit_compile=True, autograph=False)
def augment(views: tf.Tensor, draws: tf.Tensor, strength: float, blur: bool) -> tf.Tensor:
    """Augments a batch of views on the accelerator (Chen et al. 2020, appendix A).

    `views` is [n, S, S, 3] uint8, `draws` [n, NUM_DRAWS] float32. Returns [n, S, S, 3] float32 in [0, 1]: flipped with
    probability .5, jittered with .8, grey with .2 and, if `blur`, blurred with .5. XLA compiles it, on a CPU too, so that its
    many small operations run in a single pass over the pixels.
    """
    flipped = tf.where(_per_image(draws[:, DRAWS.flip] < 0.5)[..., None], views[:, :, ::-1], views)
    planes = [tf.cast(flipped[..., channel], tf.float32) / 255.0 for channel in range(3)]
    planes = _where(draws[:, DRAWS.jitter] < 0.8, jitter(planes, draws, strength), planes)
    planes = _where(draws[:, DRAWS.grey] < 0.2, 3 * [_grey(planes)], planes)
    images = tf.stack(planes, axis=-1)
    if blur:
        sigma = 0.1 + 1.9 * draws[:, DRAWS.sigma]
        images = gaussian_blur(images, views.shape[1] // 10, sigma, draws[:, DRAWS.blur] < 0.5)
    return tf.clip_by_value(images, 0.0, 1.0)


def jitter(planes: Planes, draws: tf.Tensor, strength: float) -> Planes:
    """Scales brightness, contrast and saturation and rotates the hue of [n, S, S] images, each image in its own random order."""
    low, high = max(1.0 - 0.8 * strength, 0.0), 1.0 + 0.8 * strength
    brightness, contrast, saturation = (
        _per_image(low + (high - low) * draws[:, number]) for number in (DRAWS.brightness, DRAWS.contrast, DRAWS.saturation)
    )
    turn = _per_image(0.2 * strength * (2.0 * draws[:, DRAWS.hue] - 1.0))
    order = tf.argsort(draws[:, DRAWS.order : DRAWS.order + 4], axis=1)
    when_contrast = tf.argmax(order == 1, axis=1, output_type=tf.int32)

    def stage(planes: Planes, operation: tf.Tensor, means: Planes) -> Planes:
        brighter = [plane * brightness for plane in planes]
        contrasted = [mean + (plane - mean) * contrast for plane, mean in zip(planes, means, strict=True)]
        linear = _where(operation == 0, brighter, contrasted)
        hue, colour, value = _rgb_to_hsv(planes)
        turns = _per_image(operation == 3)
        turned = tf.where(turns, tf.math.floormod(hue + turn, 1.0), hue)
        scaled = tf.where(turns, colour, tf.minimum(colour * saturation, 1.0))
        changed = _where(operation < 2, linear, _hsv_to_rgb([turned, scaled, value]))
        return [tf.clip_by_value(plane, 0.0, 1.0) for plane in changed]

    # Contrast needs the mean of the image as it is before contrast. Computing the stages before it twice takes two passes over
    # the pixels, instead of one pass a stage.
    before = planes
    for number in range(4):
        before = _where(number < when_contrast, stage(before, order[:, number], before), before)
    means = [tf.reduce_mean(plane, axis=[1, 2], keepdims=True) for plane in before]
    for number in range(4):
        planes = stage(planes, order[:, number], means)
    return planes


def _grey(planes: Planes) -> tf.Tensor:
    return sum(weight * plane for weight, plane in zip((0.2989, 0.5870, 0.1140), planes, strict=True))


def _rgb_to_hsv(planes: Planes) -> Planes:
    red, green, blue = planes
    value = tf.maximum(tf.maximum(red, green), blue)
    spread = value - tf.minimum(tf.minimum(red, green), blue)
    sixth = tf.math.divide_no_nan(1.0, 6.0 * spread)
    hue = tf.where(
        red == value,
        sixth * (green - blue),
        tf.where(green == value, sixth * (blue - red) + 1 / 3, sixth * (red - green) + 2 / 3),
    )
    hue = tf.where(spread > 0.0, tf.where(hue < 0.0, hue + 1.0, hue), 0.0)
    return [hue, tf.math.divide_no_nan(spread, value), value]


def _hsv_to_rgb(planes: Planes) -> Planes:
    hue, colour, value = planes
    shares = tf.abs(6.0 * hue - 3.0) - 1.0, 2.0 - tf.abs(6.0 * hue - 2.0), 2.0 - tf.abs(6.0 * hue - 4.0)
    return [(1.0 - colour + colour * tf.clip_by_value(share, 0.0, 1.0)) * value for share in shares]


def gaussian_blur(images: tf.Tensor, kernel_size: int, sigma: tf.Tensor, chosen: tf.Tensor) -> tf.Tensor:
    """Blurs the `chosen`, [n] bool, of `images`, [n, S, S', 3] float32, each by its own `sigma`, [n] float32 in pixels.

    Pads with zeros. The kernel reaches `kernel_size` // 2 pixels to each side. A blur along an axis is a product with a banded
    matrix, which is cheap on an accelerator's matrix unit. For images that are not chosen, the matrix is the identity.
    """

    def band(side: int) -> tf.Tensor:
        distance = tf.abs(tf.range(side)[:, None] - tf.range(side)[None, :])
        reach = kernel_size // 2
        squares = tf.cast(distance, tf.float32) ** 2
        offsets = tf.range(-reach, reach + 1, dtype=tf.float32)
        halved = -0.5 / sigma**2
        total = tf.reduce_sum(tf.exp(halved[:, None] * offsets**2), axis=1)
        weights = tf.where(distance <= reach, tf.exp(halved[:, None, None] * squares), 0.0) / total[:, None, None]
        return tf.where(chosen[:, None, None], weights, tf.eye(side))

    along_rows = tf.einsum("nij,njwc->niwc", band(images.shape[1]), images)
    return tf.einsum("nij,nhjc->nhic", band(images.shape[2]), along_rows)


def _per_image(values: tf.Tensor) -> tf.Tensor:
    return values[:, None, None]


def _where(chosen: tf.Tensor, yes: Planes, no: Planes) -> Planes:
    return [tf.where(_per_image(chosen), one, other) for one, other in zip(yes, no, strict=True)]
