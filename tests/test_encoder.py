"""The encoder and the heads: their parameters against the official code's, and what BN does."""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from trainer.encoder import make_encoder
from trainer.heads import make_classifier, make_projection
from trainer.layers import BatchNorm
from trainer.records import UserError

COUNTS = json.loads((Path(__file__).parent / "goldens" / "encoders.json").read_text())


@pytest.mark.parametrize(
    ("depth", "width", "image_size", "cifar_stem"),
    [(18, 1, 32, True), (34, 1, 224, False), (50, 1, 224, False), (50, 1, 32, True)],
)
def test_parameter_counts_are_the_official_codes(depth, width, image_size, cifar_stem):
    golden = COUNTS[f"depth{depth}_width{width}_image{image_size}_sk0.0"]
    encoder = make_encoder(depth, width, image_size, cifar_stem)
    assert sum(np.prod(v.shape) for v in encoder.trainable_variables) == golden["trainable_parameters"]
    assert sum(np.prod(v.shape) for v in encoder.non_trainable_variables) == golden["non_trainable_parameters"]
    assert len(encoder.trainable_variables) == golden["num_trainable_variables"]
    assert encoder.output_shape == (None, golden["feature_dim"])


def test_initial_weights_are_a_function_of_the_seed_alone():
    first = make_encoder(18, 0.25, 32, True, seed=3)
    make_projection(128, 2, 64)
    second = make_encoder(18, 0.25, 32, True, seed=3)
    other = make_encoder(18, 0.25, 32, True, seed=4)
    for a, b in zip(first.variables, second.variables, strict=True):
        assert a.path == b.path
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    kernel = first.trainable_variables[0]
    assert not np.array_equal(kernel.numpy(), other.trainable_variables[0].numpy())


def test_every_residual_block_starts_as_its_shortcut():
    encoder = make_encoder(18, 0.25, 32, True)
    last_norms = [layer for layer in encoder.layers if isinstance(layer, BatchNorm) and layer.zero_scale]
    assert len(last_norms) == 8
    assert all(not np.any(layer.gamma.numpy()) for layer in last_norms)


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 3, 5)])
def test_batch_norm_agrees_with_float64_in_training_and_out_of_it(shape):
    x = np.random.default_rng(0).normal(2.0, 3.0, shape).astype(np.float32)
    norm = BatchNorm()
    trained = norm(tf.constant(x), training=True)
    axes = tuple(range(len(shape) - 1))
    mean, variance = x.astype(np.float64).mean(axes), x.astype(np.float64).var(axes)
    np.testing.assert_allclose(trained, (x - mean) / np.sqrt(variance + 1e-5), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.moving_mean.numpy(), 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(norm.moving_variance.numpy(), 0.9 + 0.1 * variance, rtol=1e-5)
    frozen = norm(tf.constant(x), training=False)
    np.testing.assert_allclose(frozen, (x - 0.1 * mean) / np.sqrt(0.9 + 0.1 * variance + 1e-5), rtol=1e-4, atol=1e-5)


def test_frozen_batch_norm_does_not_move():
    norm = BatchNorm()
    norm(tf.random.stateless_normal([8, 4], [0, 1]), training=False)
    np.testing.assert_array_equal(norm.moving_mean.numpy(), np.zeros(4))
    np.testing.assert_array_equal(norm.moving_variance.numpy(), np.ones(4))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_projection_has_batch_norm_on_every_layer_and_no_offset_on_the_last(layers):
    projection = make_projection(32, layers, 16)
    names = [v.path for v in projection.trainable_variables]
    assert sum(name.endswith("kernel") for name in names) == layers
    assert sum(name.endswith("gamma") for name in names) == layers
    assert sum(name.endswith("beta") for name in names) == layers - 1
    assert not any(name.endswith("bias") for name in names)
    assert projection.output_shape == (None, 16)


def test_classifier_is_one_linear_layer():
    classifier = make_classifier(8, 5)
    assert [tuple(v.shape) for v in classifier.trainable_variables] == [(8, 5), (5,)]


def test_a_depth_that_is_not_there_is_named():
    with pytest.raises(UserError, match="depth=101"):
        make_encoder(101, 1, 32, True)
