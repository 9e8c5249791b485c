"""The layers that write out their gradients: what they compute is batch normalisation's, to float32's accuracy."""

import numpy as np
import pytest
import tensorflow as tf

from trainer.distribution import Replicas
from trainer.layers import BatchNorm, PointwiseNorm, normalized, pointwise_normalized

EPSILON = 1e-5
rng = np.random.default_rng(0)
INPUTS = np.maximum(rng.normal(size=(6, 5, 7, 8)), 0.0) + 0.3
KERNEL = rng.normal(size=(1, 1, 8, 32))
GAMMA, BETA = rng.normal(size=(2, 32))
UPSTREAM = rng.normal(size=(6, 5, 7, 32))


class Fusing(Replicas):
    recompute_in_backward = True


def by_autodiff(inputs, kernel, gamma, beta, relu):
    """Outputs and moments, by the formula."""
    z = tf.nn.conv2d(inputs, kernel, 1, "VALID")
    mean, variance = tf.nn.moments(z, [0, 1, 2])
    outputs = (z - mean) / tf.sqrt(variance + tf.cast(EPSILON, z.dtype)) * gamma + beta
    return tf.nn.relu(outputs) if relu else outputs, mean, variance


def outputs_and_gradients(function, dtype):
    values = [tf.constant(array, dtype) for array in (INPUTS, KERNEL, GAMMA, BETA)]
    with tf.GradientTape() as tape:
        for value in values:
            tape.watch(value)
        results = function(*values)
        # Not the sum of outputs: its gradient would hide what a mean over the batch takes away.
        loss = tf.reduce_sum(results[0] * tf.constant(UPSTREAM, dtype))
    return [*results, *tape.gradient(loss, values)]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("pointwise", [False, True])
def test_written_out_gradients_are_those_of_the_formula(pointwise, relu):
    if pointwise and relu:
        pytest.skip("a block adds its shortcut before the ReLU")

    def ours(inputs, kernel, gamma, beta):
        if pointwise:
            return pointwise_normalized(inputs, kernel, gamma, beta, EPSILON, Fusing())
        return normalized(tf.nn.conv2d(inputs, kernel, 1, "VALID"), gamma, beta, EPSILON, relu, Fusing())

    expected = outputs_and_gradients(lambda *values: by_autodiff(*values, relu), tf.float64)
    found = outputs_and_gradients(ours, tf.float32)
    names = ("outputs", "mean", "variance", "by inputs", "by kernel", "by gamma", "by beta")
    for name, one, other in zip(names, found, expected, strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(one, other, rtol=0, atol=5e-6 * scale, err_msg=name)


def test_in_bfloat16_a_fused_layer_errs_as_the_plain_one_does():
    """Against float64, on activations like a network's: the way by second moments loses nothing that bfloat16 has."""
    inputs = tf.constant(INPUTS, tf.bfloat16)
    exact, *_ = by_autodiff(*(tf.cast(tf.constant(a), tf.float64) for a in (inputs, KERNEL, GAMMA, BETA)), relu=False)

    def error(replicas):
        layer = PointwiseNorm(32, replicas=replicas, dtype="mixed_bfloat16")
        layer.build(INPUTS.shape)
        for variable, value in ((layer.kernel, KERNEL), (layer.gamma, GAMMA), (layer.beta, BETA)):
            variable.assign(value)
        outputs = tf.cast(layer(inputs, training=True), tf.float64)
        return float(tf.sqrt(tf.reduce_mean(tf.square(outputs - exact))))

    assert 0.0 < error(Fusing()) < 1.2 * error(Replicas())


def layer_of(kind, **more):
    layer = kind(**({"filters": 32} if kind is PointwiseNorm else {}), **more)
    layer.build(INPUTS.shape if kind is PointwiseNorm else UPSTREAM.shape)
    for name, value in (("kernel", KERNEL), ("gamma", GAMMA), ("beta", BETA)):
        if hasattr(layer, name):
            getattr(layer, name).assign(value)
    return layer


@pytest.mark.parametrize("replicas", [Replicas(), Fusing()], ids=["stored", "recomputed"])
@pytest.mark.parametrize("kind", [BatchNorm, PointwiseNorm])
def test_ghost_batches_have_statistics_and_gradients_of_their_own(kind, replicas):
    """Against float64, each ghost batch alone; the moving moments are the mean over ghost batches."""
    layer = layer_of(kind, replicas=replicas, ghost_rows=2)
    inputs = INPUTS if kind is PointwiseNorm else UPSTREAM * UPSTREAM
    ours = tf.constant(inputs, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(ours)
        outputs = layer(ours, training=True)
        loss = tf.reduce_sum(outputs * tf.constant(UPSTREAM, tf.float32))
    variables = [layer.gamma.value, layer.beta.value] + ([layer.kernel.value] if kind is PointwiseNorm else [])
    found = [outputs, *tape.gradient(loss, [ours, *variables])]

    exact = tf.constant(inputs)
    gamma, beta, kernel = (tf.constant(array) for array in (GAMMA, BETA, KERNEL))
    with tf.GradientTape() as tape:
        tape.watch([exact, gamma, beta, kernel])
        weights = kernel if kind is PointwiseNorm else tf.eye(32, dtype=tf.float64)[None, None]
        parts = [by_autodiff(rows, weights, gamma, beta, relu=False) for rows in tf.split(exact, 3)]
        normal = tf.concat([part for part, *_ in parts], axis=0)
        loss = tf.reduce_sum(normal * tf.constant(UPSTREAM))
    expected = [normal, *tape.gradient(loss, [exact, gamma, beta] + ([kernel] if kind is PointwiseNorm else []))]
    for name, one, other in zip(("outputs", "by inputs", "by gamma", "by beta", "by kernel"), found, expected, strict=False):
        np.testing.assert_allclose(one, other, rtol=0, atol=5e-6 * np.abs(other).max(), err_msg=name)
    mean, variance = (np.mean([part[which] for part in parts], axis=0) for which in (1, 2))
    np.testing.assert_allclose(layer.moving_mean, 0.1 * mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer.moving_variance, 0.9 + 0.1 * variance, rtol=1e-5)


@pytest.mark.parametrize("replicas", [Replicas(), Fusing()], ids=["stored", "recomputed"])
@pytest.mark.parametrize("kind", [BatchNorm, PointwiseNorm])
def test_one_ghost_batch_of_all_rows_has_the_bits_of_the_whole_batch(kind, replicas):
    inputs = tf.constant(INPUTS if kind is PointwiseNorm else UPSTREAM, tf.float32)
    ends = []
    for rows in (0, len(INPUTS)):
        layer = layer_of(kind, replicas=replicas, ghost_rows=rows)
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs, training=True)
        ends.append([outputs, tape.gradient(outputs, inputs, tf.constant(UPSTREAM, tf.float32)), *layer.get_weights()])
        ends[-1].append(layer(inputs, training=False))
    for whole, ghost in zip(*ends, strict=True):
        np.testing.assert_array_equal(whole, ghost)


@pytest.mark.parametrize("kind", [BatchNorm, PointwiseNorm])
def test_moving_moments_are_the_same_either_way_and_serve_alike_afterwards(kind):
    ends = []
    for replicas in (Replicas(), Fusing()):
        more = {"filters": 32} if kind is PointwiseNorm else {}
        layer = kind(replicas=replicas, **more)
        inputs = tf.constant(INPUTS if more else UPSTREAM, tf.float32)
        layer.build(inputs.shape)
        if more:
            layer.kernel.assign(KERNEL)
        for _ in range(3):
            layer(inputs, training=True)
        ends.append([layer.moving_mean.numpy(), layer.moving_variance.numpy(), layer(inputs, training=False).numpy()])
    for one, other in zip(*ends, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)
    assert type(layer).from_config(layer.get_config()).get_config() == layer.get_config()
