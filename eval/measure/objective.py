"""The global contrastive objective of projections, over all pairs of images, and its gradient."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from eval.measure.logistic import even_rows, matrix_product, over_replicas, padded
from trainer.settings import LinearEvalSettings

GROUPS = 10
"""Number of groups of sampled anchors. The spread of the groups' squared gradients gives a standard error."""
_ROWS_AT_ONCE = 1 << 10
_IMAGES_AT_ONCE = 1 << 12
_LOWEST = -1e30
"""Start of a running maximum. It is finite, because infinity minus infinity is not a number."""
_PADDING = -1

Arrays = tuple[np.ndarray, ...]
Tensors = tuple[tf.Tensor, ...]
Update = Callable[[Tensors, Tensors, Tensors], Tensors]


@dataclass(frozen=True)
class GlobalObjective:
    """The objective F of n images with two views each (Yuan et al. 2022), and its gradient by their projections.

    z_iv is the normalised projection of view v of image i, and t the temperature. g_iv is the mean of exp(z_iv z_jw / t) over
    both views w of all other images j. F is the mean over i of -z_i1 z_i2 + (t / 2) (log g_i1 + log g_i2). This is t / 2 times
    the decoupled NT-Xent of one batch of all images, plus the constant -t log(2n - 2).
    """

    value: float
    """F = contrast - alignment. Lower is better; 0 if all projections are equal."""
    alignment: float
    """Mean of z_i1 z_i2 over all images."""
    contrast: float
    """Mean of t log g_iv over the anchors."""
    standard_error: float
    """Standard error of `contrast`, and of `value`; 0 if all images are anchors."""
    gradient_norm: float
    """Root mean square, over the anchors' projections, of the length of 2n dF/dz_iv without its part along z_iv.

    F is a mean over 2n projections, so the factor makes the length independent of n. Moving z_iv along itself does not change the
    normalised projection.
    """
    gradient_norm_standard_error: float
    """Standard error of `gradient_norm`; 0 if all images are anchors."""
    images: int
    """n, the number of images."""
    anchors: int
    """Number of images whose g was computed."""


def global_objective(
    projections: np.ndarray,
    temperature: float,
    *,
    anchors: int = LinearEvalSettings.objective_anchors,
    seed: int = 0,
    strategy: tf.distribute.Strategy | None = None,
    on_progress: Callable[[float], None] = lambda done: None,
) -> GlobalObjective:
    """Returns the global objective of `projections`, [n, 2, d] float32 with n >= 2: two views of each image, of any length.

    The result is exact if n <= `anchors`. Of more images, `anchors` are drawn by `seed`, in GROUPS groups of the same size, at
    least 3. The g of each anchor is still over all images. A projection's gradient has two parts: as an anchor, which is exact,
    and as a negative of all other anchors, of which only those of the same group are counted. Its squared length is estimated
    without bias: each product of two terms of the second part is divided by the probability that the group holds both (Horvitz
    & Thompson 1952). `gradient_norm` is the root of the groups' mean, or 0 if that is negative.

    Products are float32, in blocks; means over images are float64. Memory grows with the anchors, beside `projections`. The
    replicas of `strategy`, by default TensorFlow's current one, share the anchors. Calls `on_progress(finished fraction)` after
    each block.
    """
    strategy = strategy or tf.distribute.get_strategy()
    count = len(projections)
    chosen = _anchors(count, anchors, seed)
    exact = len(chosen) == count
    groups = np.split(np.arange(len(chosen)), 1 if exact else GROUPS)
    pairs = len(chosen) * (count + len(groups[0]))

    def on_images(anchors: int, before: int) -> Callable[[int], None]:
        return lambda done: on_progress((before + anchors * done) / pairs)

    z = _unit(projections[chosen])
    alignment = 0.0

    def every_image() -> Iterator[Arrays]:
        nonlocal alignment
        for part in _parts(count):
            views = _unit(projections[part])
            alignment += np.sum(views[:, 0] * views[:, 1], dtype=np.float64)
            yield views, np.arange(part.start, part.stop)

    initial = np.full(z.shape[:2], _LOWEST, np.float32), np.zeros(z.shape[:2], np.float32), np.zeros_like(z)
    sweep = _make_sweep(strategy, _as_anchors(temperature))
    most, total, mean = sweep((z, chosen), initial, every_image(), on_images(len(chosen), 0))
    log_total = most.astype(np.float64) + np.log(total.astype(np.float64))
    contrasts = temperature * (log_total - np.log(2 * (count - 1))).mean(axis=1)
    as_anchor = mean / total[..., None] - 2 * z[:, ::-1]

    squares = []
    sweep = _make_sweep(strategy, _as_negatives(temperature, exact))
    for number, group in enumerate(groups):
        own = z[group], chosen[group], log_total[group].astype(np.float32)
        zeros = np.zeros_like(own[0]), np.zeros(own[0].shape[:2], np.float32)
        known = (tuple(array[part] for array in own) for part in _parts(len(group)))
        total, squared = sweep(own[:2], zeros, known, on_images(len(group), len(chosen) * count + number * len(group) ** 2))
        squares.append(_mean_square(as_anchor[group], total, squared, own[0], count))

    contrast, alignment = float(contrasts.mean()), float(alignment / count)
    square = max(float(np.mean(squares)), 0.0)
    left_out = 0.0 if exact else 1 - len(chosen) / count
    norm = float(np.sqrt(square))
    return GlobalObjective(
        value=contrast - alignment,
        alignment=alignment,
        contrast=contrast,
        standard_error=float(contrasts.std(ddof=1) * np.sqrt(left_out / len(chosen))),
        gradient_norm=norm,
        gradient_norm_standard_error=0.0 if exact else float(np.sqrt(square + np.std(squares, ddof=1) / np.sqrt(GROUPS))) - norm,
        images=count,
        anchors=len(chosen),
    )


def _anchors(count: int, most: int, seed: int) -> np.ndarray:
    """Returns the images that are anchors, in ascending order in each group: all, or a multiple of GROUPS, at most `most`."""
    if count < 2:
        raise ValueError(f"{count} images have no negatives")
    if count <= most:
        return np.arange(count)
    size = most // GROUPS
    if size < 3:
        raise ValueError(f"{most} anchors are fewer than 3 in each of {GROUPS} groups")
    drawn = np.random.Generator(np.random.Philox(key=[seed, 1])).permutation(count)[: GROUPS * size]
    return np.sort(drawn.reshape(GROUPS, size), axis=1).ravel()


def _mean_square(as_anchor: np.ndarray, total: np.ndarray, squared: np.ndarray, z: np.ndarray, count: int) -> float:
    """Estimates the mean square of a group's gradients over all `count` images without bias.

    All are [m, 2, d], but `squared`, [m, 2]. `total` is the sum of the second part's terms over the other m - 1 images of the
    group, `squared` the sum of their squares.
    """
    of_one, of_two = 1.0, 1.0
    if len(z) < count:
        of_one = (count - 1) / (len(z) - 1)
        of_two = of_one * (count - 2) / (len(z) - 2)
    total = _tangential(total, z)
    square = np.sum((_tangential(as_anchor, z) + of_one * total) ** 2, axis=2, dtype=np.float64)
    square += (of_two - of_one**2) * np.sum(total**2, axis=2, dtype=np.float64) + (of_one - of_two) * squared
    return float(square.mean())


def _tangential(gradient: np.ndarray, z: np.ndarray) -> np.ndarray:
    return gradient - np.sum(gradient * z, axis=-1, keepdims=True) * z


def _unit(projections: np.ndarray) -> np.ndarray:
    return projections / np.maximum(np.linalg.norm(projections, axis=-1, keepdims=True), 1e-12)


def _parts(count: int) -> Iterator[slice]:
    rows = even_rows(count, _IMAGES_AT_ONCE, 1)
    return (slice(begin, min(begin + rows, count)) for begin in range(0, count, rows))


def _make_sweep(strategy: tf.distribute.Strategy, update: Update) -> Callable[..., Arrays]:
    """Returns a function that passes parts of images, one after another, to `update`, which changes a state of every anchor.

    `update(anchors, state, others)` gets blocks. The first two have one row for each projection. In the third, the second views
    follow the first views; images of padding have the ID _PADDING.
    """
    replicas = strategy.num_replicas_in_sync

    @tf.function(autograph=False)
    def updated(anchors: Tensors, state: Tensors, others: Tensors) -> Tensors:
        def on_replica(anchors: Tensors, state: Tensors, others: Tensors) -> Tensors:
            return tf.map_fn(
                # Maps over numbers, because mapping over the anchors would copy them.
                lambda number: update(tuple(one[number] for one in anchors), tuple(one[number] for one in state), others),
                tf.range(anchors[0].shape[0]),
                parallel_iterations=1,
                fn_output_signature=tuple(one.dtype for one in state),
            )

        return strategy.run(on_replica, args=(anchors, state, others))

    def sweep(anchors: Arrays, state: Arrays, parts: Iterator[Arrays], on_images: Callable[[int], None]) -> Arrays:
        """Takes arrays [m, 2, ...] and IDs, [m], of anchors; the same, [c, 2, ...] and [c], of each of `parts`."""
        projections = 2 * len(anchors[0])
        at_once = even_rows(projections, _ROWS_AT_ONCE * replicas, replicas) // replicas
        blocks = -(-projections // (at_once * replicas)) * replicas

        def divided(array: np.ndarray) -> tf.Tensor:
            flat = array.reshape(projections, *array.shape[2:]) if array.ndim > 1 else np.repeat(array.astype(np.int32), 2)
            return over_replicas(strategy, padded(flat, blocks * at_once).reshape(blocks, at_once, *flat.shape[1:]))

        now, rows, images, done = tuple(map(divided, state)), tuple(map(divided, anchors)), 0, 0
        for part in parts:
            images = images or len(part[0])
            now = updated(rows, now, tuple(_by_view(array, images) for array in part))
            done += len(part[0])
            on_images(done)
        return tuple(
            np.concatenate([local.numpy() for local in strategy.experimental_local_results(one)])
            .reshape(blocks * at_once, *like.shape[2:])[:projections]
            .reshape(like.shape)
            for one, like in zip(now, state, strict=True)
        )

    return sweep


def _by_view(array: np.ndarray, images: int) -> tf.Tensor:
    """Returns [c, 2, ...] or IDs, [c], as [2 * `images`, ...], the second views after the first ones."""
    if array.ndim == 1:
        return tf.constant(np.tile(padded(array.astype(np.int32) - _PADDING, images) + _PADDING, 2))
    return tf.constant(np.concatenate([padded(array[:, view], images) for view in (0, 1)]))


def _as_anchors(temperature: float) -> Update:
    """Returns the update of (maximum m of the logits, sum of exp(logit - m), the same weighted sum of the negatives)."""
    multiply = matrix_product()

    def update(anchors: Tensors, state: Tensors, others: Tensors) -> Tensors:
        (z, ids), (most, total, weighted), (negatives, other_ids) = anchors, state, others
        logits = multiply(z, negatives, transpose_b=True) / temperature
        logits = tf.where(_is_no_negative(ids, other_ids), -np.inf, logits)
        now = tf.maximum(most, tf.reduce_max(logits, axis=1))
        weights, kept = tf.exp(logits - now[:, None]), tf.exp(most - now)
        total = total * kept + tf.reduce_sum(weights, axis=1)
        return now, total, weighted * kept[:, None] + multiply(weights, negatives)

    return update


def _as_negatives(temperature: float, exact: bool) -> Update:
    """Returns the update of (sum over other anchors j of the terms t_j, sum of their squares).

    t_j is the derivative of anchor j's contrasts by the projection, both views together. Its square is without the part along the
    projection. If `exact`, squares are not summed.
    """
    multiply = matrix_product()

    def update(anchors: Tensors, state: Tensors, others: Tensors) -> Tensors:
        (z, ids), (total, squared), (other, other_ids, log_totals) = anchors, state, others
        cosines = multiply(z, other, transpose_b=True)
        weights = tf.exp(cosines / temperature - log_totals[None, :])
        weights = tf.where(_is_no_negative(ids, other_ids), 0.0, weights)
        if not exact:
            views = tf.split(other, 2)
            (weight1, weight2), (along1, along2) = (tf.split(array, 2, axis=1) for array in (weights, weights * cosines))
            between = tf.reduce_sum(views[0] * views[1], axis=1)
            lengths = weight1**2 + weight2**2 + 2.0 * weight1 * weight2 * between - (along1 + along2) ** 2
            squared += tf.reduce_sum(lengths, axis=1)
        return total + multiply(weights, other), squared

    return update


def _is_no_negative(ids: tf.Tensor, other_ids: tf.Tensor) -> tf.Tensor:
    return (ids[:, None] == other_ids[None, :]) | (other_ids == _PADDING)[None, :]
