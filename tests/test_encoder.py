"""The encoder and the heads: their parameters against the official code's, and what BN does."""

import json
import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.config import Config, replace
from trainer.encoder import make_encoder
from trainer.heads import make_classifier, make_projection
from trainer.layers import BatchNorm

COUNTS = json.loads((Path(__file__).parent / "goldens" / "encoders.json").read_text())


def encoder_of(**settings):
    config = replace(Config(), **settings)
    return make_encoder(config.encoder, config.views.image_size, config.run.seed)


@pytest.mark.thorough
@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_official_codes(name):
    depth, width, image, ratio = re.fullmatch(r"depth(\d+)_width(\d+)_image(\d+)_sk([\d.]+)", name).groups()
    golden = COUNTS[name]
    encoder = encoder_of(
        depth=int(depth),
        width_multiplier=float(width),
        image_size=int(image),
        cifar_stem=image == "32",
        selective_kernel_ratio=float(ratio),
    )
    assert sum(np.prod(v.shape) for v in encoder.trainable_variables) == golden["trainable_parameters"]
    assert sum(np.prod(v.shape) for v in encoder.non_trainable_variables) == golden["non_trainable_parameters"]
    assert len(encoder.trainable_variables) == golden["num_trainable_variables"]
    assert encoder.output_shape == (None, golden["feature_dim"])


SMALL = {"depth": 18, "width_multiplier": 0.25, "image_size": 32, "cifar_stem": True}


def test_initial_weights_are_a_function_of_the_seed_alone():
    first = encoder_of(**SMALL, seed=3)
    make_projection(128, 2, 64)
    second = encoder_of(**SMALL, seed=3)
    other = encoder_of(**SMALL, seed=4)
    for a, b in zip(first.variables, second.variables, strict=True):
        assert a.path == b.path
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    kernel = first.trainable_variables[0]
    assert not np.array_equal(kernel.numpy(), other.trainable_variables[0].numpy())


@pytest.mark.parametrize(("depth", "blocks"), [(10, 4), (18, 8)])
def test_every_residual_block_starts_as_its_shortcut(depth, blocks):
    encoder = encoder_of(**{**SMALL, "depth": depth})
    last_norms = [layer for layer in encoder.layers if isinstance(layer, BatchNorm) and layer.zero_scale]
    assert len(last_norms) == blocks
    assert all(not np.any(layer.gamma.numpy()) for layer in last_norms)


def test_bfloat16_computes_in_bfloat16_and_keeps_everything_else_in_float32():
    images = np.random.default_rng(0).random((4, 32, 32, 3), np.float32)
    exact, rounded = encoder_of(**SMALL), encoder_of(**SMALL, precision="bfloat16")
    assert {variable.dtype for variable in rounded.variables} == {"float32"}
    assert {layer.compute_dtype for layer in rounded.layers if layer.name.endswith("conv1")} == {"bfloat16"}
    features, expected = rounded(images, training=True), exact(images, training=True)
    assert features.dtype == tf.float32
    np.testing.assert_allclose(features, expected, atol=0.05)
    assert not np.array_equal(features, expected)
    for a, b in zip(rounded.non_trainable_variables, exact.non_trainable_variables, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=0.05, atol=0.02)


def test_selective_kernels_weigh_two_paths_that_sum_to_one():
    encoder = encoder_of(depth=50, width_multiplier=0.0625, image_size=32, selective_kernel_ratio=0.0625)
    images = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
    assert np.all(np.isfinite(encoder(images, training=True)))
    name = "group1_block1_attend"
    kernel = encoder.get_layer(name).kernel
    kernel.assign(tf.zeros_like(kernel))
    attention = keras.Model(encoder.input, encoder.get_layer("group1_block1_conv3").input)(images)
    paths = keras.Model(encoder.input, encoder.get_layer("group1_block1_paths").output)(images)
    np.testing.assert_allclose(attention, tf.reduce_mean(paths, axis=3), rtol=1e-5)


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
