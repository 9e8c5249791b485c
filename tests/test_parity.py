"""Parity: 200 steps of this trainer under `tf_official` against the formulas of the official code, written out in float64.

The transcription shares with the trainer the initial weights and the augmented images of each batch, and nothing else: network,
normalisation, loss, u, LARS and schedule are written here, plainly, after the paper and the official code.
"""

import math

import numpy as np
import tensorflow as tf

from trainer import checkpoint as checkpoints
from trainer.augmentation import augment
from trainer.input_pipeline import training_batches
from trainer.presets import resolve
from trainer.records import read_manifest
from trainer.train import create_train_state, train

IMAGES, BATCH, EPOCHS, WARMUP_EPOCHS = 48, 12, 50, 5
GAMMA, TEMPERATURE, BASE_LEARNING_RATE, WEIGHT_DECAY = 0.9, 0.3, 0.4, 1e-4
STEPS = IMAGES * EPOCHS // BATCH + 1
SETTINGS = [
    *("width_multiplier=0.0625", "image_size=16", f"global_batch_size={BATCH}", f"epochs={EPOCHS}", "log_every_steps=1"),
    *(f"warmup_epochs={WARMUP_EPOCHS}", f"gamma={GAMMA}", f"temperature={TEMPERATURE}", "variant=tf_official", "optimizer=lars"),
    *(f"base_learning_rate={BASE_LEARNING_RATE}", "learning_rate_scaling=sqrt", f"weight_decay={WEIGHT_DECAY}"),
]

Weights = dict[str, tf.Variable]


def normalised(x: tf.Tensor, weights: Weights, name: str) -> tf.Tensor:
    axes = list(range(len(x.shape) - 1))
    mean, variance = tf.nn.moments(x, axes)
    x = (x - mean) / tf.sqrt(variance + 1e-5) * weights[f"{name}/gamma"]
    return x + weights[f"{name}/beta"] if f"{name}/beta" in weights else x


def convolved(x: tf.Tensor, weights: Weights, name: str, stride: int) -> tf.Tensor:
    kernel = weights[f"{name}/kernel"]
    reach = (kernel.shape[0] - 1) // 2
    x = tf.pad(x, [[0, 0], [reach, reach], [reach, reach], [0, 0]])
    return tf.nn.conv2d(x, kernel, stride, "VALID")


def projections(images: tf.Tensor, weights: Weights) -> tf.Tensor:
    """ResNet-18 with the stem for small images, average pooling, and the head of two layers; [2B, d], normalised."""
    x = tf.nn.relu(normalised(convolved(images, weights, "encoder/stem_conv", 1), weights, "encoder/stem_norm"))
    for group in range(1, 5):
        for block in (1, 2):
            name = f"encoder/group{group}_block{block}"
            stride = 2 if group > 1 and block == 1 else 1
            y = tf.nn.relu(normalised(convolved(x, weights, f"{name}_conv1", stride), weights, f"{name}_norm1"))
            y = normalised(convolved(y, weights, f"{name}_conv2", 1), weights, f"{name}_norm2")
            if block == 1:
                x = normalised(convolved(x, weights, f"{name}_shortcut_conv", stride), weights, f"{name}_shortcut_norm")
            x = tf.nn.relu(x + y)
    x = tf.reduce_mean(x, [1, 2])
    x = tf.nn.relu(normalised(x @ weights["projection/dense1/kernel"], weights, "projection/norm1"))
    x = normalised(x @ weights["projection/dense2/kernel"], weights, "projection/norm2")
    return x / tf.norm(x, axis=1, keepdims=True)


def surrogate(z: tf.Tensor, u: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the loss and the new u, the sum of both views' estimates, of a batch whose stored u is [B]."""
    views = tf.split(z, 2)
    others = 1.0 - tf.eye(BATCH, dtype=tf.float64)
    loss, stored = 0.0, 0.0
    for anchor, other in (views, views[::-1]):
        cross, within = anchor @ tf.transpose(other), anchor @ tf.transpose(anchor)
        negatives = tf.concat([cross, within], 1)
        counted = tf.concat([others, others], 1) / (2 * (BATCH - 1))
        contrast = tf.reduce_sum(counted * tf.exp(negatives / TEMPERATURE), 1)
        own = (1 - GAMMA) * u + GAMMA * contrast
        p = tf.stop_gradient(tf.exp(negatives / TEMPERATURE) / own[:, None])
        loss += tf.reduce_mean(-tf.linalg.diag_part(cross) + tf.reduce_sum(counted * p * negatives, 1))
        stored += tf.stop_gradient(own)
    return loss, stored


def learning_rate(step: int) -> float:
    peak = BASE_LEARNING_RATE * math.sqrt(BATCH)
    warmup = WARMUP_EPOCHS * IMAGES // BATCH
    if step < warmup:
        return peak * step / warmup
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))


def lars(weight: tf.Variable, momentum: tf.Variable, gradient: tf.Tensor, rate: tf.Tensor) -> None:
    if len(weight.shape) > 1:
        gradient += WEIGHT_DECAY * weight
        rate *= 0.001 * tf.norm(weight) / tf.norm(gradient)
    momentum.assign(0.9 * momentum + rate * gradient)
    weight.assign_sub(momentum)


def transcribed(config, data: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the loss of every step, [STEPS] float64, and u at the end, [IMAGES] float64."""
    manifest = read_manifest(data)
    arrays = create_train_state(config, IMAGES, manifest.num_classes).arrays()
    weights = {
        name: tf.Variable(value.astype(np.float64))
        for name, value in arrays.items()
        if name.split("/")[0] in ("encoder", "projection") and "moving" not in name
    }
    momenta = {name: tf.Variable(tf.zeros_like(weight)) for name, weight in weights.items()}
    u = tf.Variable(tf.zeros(IMAGES, tf.float64))

    @tf.function(autograph=False)
    def step(images: tf.Tensor, ids: tf.Tensor, rate: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss, stored = surrogate(projections(images, weights), tf.gather(u, ids))
        gradients = tape.gradient(loss, weights)
        for name, weight in weights.items():
            lars(weight, momenta[name], gradients[name], rate)
        u.scatter_nd_update(ids[:, None], stored)
        return loss

    losses = []
    for number, batch in enumerate(training_batches(config, data, manifest, 0).take(STEPS)):
        views, draws = (tf.concat([batch[name][:, 0], batch[name][:, 1]], 0) for name in ("views", "draws"))
        images = tf.cast(augment(views, draws, config.color_jitter_strength, config.blur), tf.float64)
        losses.append(step(images, batch["image_id"], tf.constant(learning_rate(number), tf.float64)).numpy())
    return np.array(losses), u.numpy()


def test_200_steps_have_the_losses_of_the_formulas_in_float64(dataset, tmp_path):
    config = resolve("demo", SETTINGS)
    ours = []
    train(config, str(dataset), str(tmp_path), log_metrics=lambda metrics, _: ours.append(metrics["train/contrastive_loss"]))
    theirs, u = transcribed(config, str(dataset))
    print(np.abs(np.array(ours) - theirs).reshape(-1, 3).max(1), ours[::20])
    assert len(ours) == STEPS == 201
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    np.testing.assert_allclose(checkpoints.load_latest(str(tmp_path)).arrays["u"], u, rtol=1e-2)
    assert np.mean(theirs[-20:]) < np.mean(theirs[:20]) - 0.1
