"""The global objective and its gradient: exact against float64, sampled within standard errors, estimated by the trainer."""

import numpy as np
import pytest
import tensorflow as tf

from eval.measure import objective
from eval.measure.objective import GROUPS, global_objective
from trainer.losses.global_contrastive import VARIANTS, gamma_of_visit, global_contrastive
from trainer.losses.global_contrastive import global_objective as estimated_by_training


def near_classes(count: int, dim: int, seed: int = 0, spread: float = 0.7) -> np.ndarray:
    """Two views of images of five classes, not normalised, [count, 2, dim] float32."""
    random = np.random.default_rng(seed)
    classes = random.normal(size=(5, dim))[random.integers(5, size=count)]
    images = classes + spread * random.normal(size=(count, dim))
    views = images[:, None] + spread / 2 * random.normal(size=(count, 2, dim))
    return (views * random.uniform(0.1, 10, size=(count, 2, 1))).astype(np.float32)


def oracle(projections: np.ndarray, temperature: float) -> dict[str, float]:
    """The definitions in float64, over a matrix of all pairs; the gradient by autodiff."""
    count = len(projections)
    hidden = tf.constant(projections, tf.float64)
    unit = tf.math.l2_normalize(hidden, axis=2, epsilon=0.0)
    with tf.GradientTape() as tape:
        tape.watch(unit)
        z = tf.reshape(unit, [2 * count, -1])
        images = np.arange(2 * count) // 2
        others = tf.constant(images[:, None] != images[None, :], tf.float64)
        g = tf.reduce_sum(tf.exp(z @ tf.transpose(z) / temperature) * others, axis=1) / (2 * (count - 1))
        alignment = tf.reduce_mean(tf.reduce_sum(unit[:, 0] * unit[:, 1], axis=1))
        contrast = tf.reduce_mean(temperature * tf.math.log(g))
        value = contrast - alignment
    gradient = 2 * count * tape.gradient(value, unit)
    tangential = gradient - tf.reduce_sum(gradient * unit, axis=2, keepdims=True) * unit
    norm = tf.sqrt(tf.reduce_mean(tf.reduce_sum(tangential**2, axis=2)))
    found = {"value": value, "alignment": alignment, "contrast": contrast, "gradient_norm": norm}
    return {name: float(number) for name, number in found.items()}


def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(objective, "_ROWS_AT_ONCE", 32)
    monkeypatch.setattr(objective, "_IMAGES_AT_ONCE", 16)


@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.05, 0.003])
@pytest.mark.parametrize("count", [2, 3, 53, 97])
def test_up_to_the_limit_it_is_exact(monkeypatch, count, temperature):
    small_blocks(monkeypatch)
    projections = near_classes(count, 12, seed=count)
    found, expected = global_objective(projections, temperature), oracle(projections, temperature)
    for name, number in expected.items():
        np.testing.assert_allclose(getattr(found, name), number, rtol=2e-5, atol=2e-6, err_msg=name)
    assert found.value == found.contrast - found.alignment
    assert (found.standard_error, found.gradient_norm_standard_error) == (0, 0)
    assert (found.images, found.anchors) == (count, count)


def test_blocks_do_not_change_it(monkeypatch):
    projections = near_classes(80, 12)
    whole = global_objective(projections, 0.1)
    small_blocks(monkeypatch)
    done: list[float] = []
    divided = global_objective(projections, 0.1, on_progress=done.append)
    for name in ("value", "alignment", "contrast", "gradient_norm"):
        np.testing.assert_allclose(getattr(divided, name), getattr(whole, name), rtol=1e-6)
    assert done == sorted(done)
    assert done[-1] == 1
    assert len(done) == 10


def test_equal_projections_have_the_objective_0_and_no_gradient():
    collapsed = np.tile(np.linspace(-1, 2, 8, dtype=np.float32), (20, 2, 1))
    for temperature in (0.5, 0.05):
        found = global_objective(collapsed, temperature)
        assert abs(found.value) < 1e-6
        assert found.alignment == pytest.approx(1)
        assert found.gradient_norm < 1e-5


def test_the_gradient_is_the_change_of_the_objective():
    """Against a difference of float64 objectives, along the steepest direction of one projection."""
    projections = near_classes(6, 4).astype(np.float64)
    projections /= np.linalg.norm(projections, axis=2, keepdims=True)
    random = np.random.default_rng(1)
    squares = []
    for image in range(6):
        for view in (0, 1):
            axes = np.linalg.qr(np.column_stack([projections[image, view], random.normal(size=(4, 3))]))[0][:, 1:]
            slopes = []
            for axis in axes.T:
                moved = [projections.copy() for _ in range(2)]
                for one, sign in zip(moved, (1, -1), strict=True):
                    one[image, view] += sign * 1e-5 * axis
                slopes.append((oracle(moved[0], 0.2)["value"] - oracle(moved[1], 0.2)["value"]) / 2e-5)
            squares.append(np.sum(np.square(12 * np.array(slopes))))
    assert global_objective(projections.astype(np.float32), 0.2).gradient_norm == pytest.approx(
        np.sqrt(np.mean(squares)), rel=1e-4
    )


@pytest.fixture
def untraced():
    """Runs TensorFlow's functions without a graph, because making one takes longer than a small function."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.mark.usefixtures("untraced")
def test_a_sample_of_anchors_is_within_its_standard_errors_of_the_exact_value():
    """Over many seeds the means have no bias, and the deviations are the standard errors."""
    projections, seeds = near_classes(200, 8), 40
    exact = global_objective(projections, 0.3)
    found = [global_objective(projections, 0.3, anchors=40, seed=seed) for seed in range(seeds)]
    assert {one.anchors for one in found} == {40}
    assert {one.alignment for one in found} == {exact.alignment}
    values = np.array([one.value for one in found])
    assert abs(values.mean() - exact.value) < 3 * values.std() / np.sqrt(seeds)
    assert np.mean([one.standard_error for one in found]) == pytest.approx(values.std(), rel=0.3)
    squares = np.array([one.gradient_norm**2 for one in found])
    assert abs(squares.mean() - exact.gradient_norm**2) < 3 * squares.std() / np.sqrt(seeds)
    within = [abs(one.gradient_norm - exact.gradient_norm) < 2 * one.gradient_norm_standard_error for one in found]
    assert np.mean(within) > 0.85
    repeated = global_objective(projections, 0.3, anchors=40, seed=3)
    assert repeated == found[3]


def test_as_few_anchors_as_there_are_groups_are_refused():
    with pytest.raises(ValueError, match="20 anchors are fewer than 3 in each of"):
        global_objective(near_classes(50, 4), 0.1, anchors=2 * GROUPS)
    with pytest.raises(ValueError, match="1 images have no negatives"):
        global_objective(near_classes(1, 4), 0.1)


def u_at_rest(projections: np.ndarray, temperature: float, gamma: float, batches: int) -> np.ndarray:
    """The trainer's u after so many batches of all images, whose projections stay as they are."""
    z1, z2 = tf.unstack(tf.math.l2_normalize(projections, axis=2), axis=1)
    u = tf.zeros([len(projections)])
    for _ in range(batches):
        gammas = gamma_of_visit(u, gamma, VARIANTS["paper"])
        u = global_contrastive(z1, z2, z1, z2, tf.range(len(u)), u, gammas, temperature, VARIANTS["paper"]).u
    return u


@pytest.mark.parametrize(("gamma", "batches"), [(1.0, 1), (0.5, 60)])
@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.05])
def test_training_estimates_the_contrast_where_its_u_has_come_to_rest(temperature, gamma, batches):
    """Training stores one u for two views. Its log is the log of a mean, which is not less than the mean of two logs."""
    projections = near_classes(60, 12)
    found = global_objective(projections, temperature).contrast
    trained = float(estimated_by_training(u_at_rest(projections, temperature, gamma, batches), temperature))
    z = projections.astype(np.float64) / np.linalg.norm(projections, axis=2, keepdims=True)
    flat, images = z.reshape(120, -1), np.arange(120) // 2
    g = np.mean(np.exp(flat @ flat.T / temperature)[images[:, None] != images].reshape(60, 2, 118), axis=2)
    gap = temperature * np.mean(np.log(g.mean(axis=1)) - np.log(g).mean(axis=1))
    assert gap > 0
    assert trained - found == pytest.approx(gap, abs=1e-6)


def test_training_estimates_the_contrast_itself_if_both_views_are_alike():
    projections = near_classes(60, 12)
    projections[:, 1] = projections[:, 0]
    found = global_objective(projections, 0.1).contrast
    assert float(estimated_by_training(u_at_rest(projections, 0.1, 0.9, 20), 0.1)) == pytest.approx(found, abs=1e-6)
