"""Parity: 200 steps of this trainer under `tf_official` against the formulas of the official code, written out in float64.

The transcription shares with the trainer the initial weights and the augmented images of each batch, and nothing else: network,
normalisation, loss, u, LARS and schedule are written here, plainly, after the paper and the official code.
"""

import math

import numpy as np
import pytest
import tensorflow as tf
from support.lifted import lift

import trainer.train
from trainer import checkpoint as checkpoints
from trainer.augmentation import augment
from trainer.input_pipeline import training_batches
from trainer.presets import resolve
from trainer.shared.records import read_manifest
from trainer.state import create_train_state
from trainer.train import train

IMAGES, BATCH, EPOCHS, WARMUP_EPOCHS, CHECKPOINT_EPOCHS = 48, 12, 50, 5, 5
GAMMA, TEMPERATURE, BASE_LEARNING_RATE, WEIGHT_DECAY = 0.9, 0.3, 1e-4, 1e-4
STEPS = IMAGES * EPOCHS // BATCH + 1
SETTINGS = [
    *("width_multiplier=0.0625", "image_size=8", f"global_batch_size={BATCH}", f"epochs={EPOCHS}", "log_every_steps=1"),
    *(f"checkpoint_every_epochs={CHECKPOINT_EPOCHS}", f"keep_checkpoints={EPOCHS}"),
    *(f"warmup_epochs={WARMUP_EPOCHS}", f"gamma={GAMMA}", f"temperature={TEMPERATURE}", "variant=tf_official", "optimizer=lars"),
    *(f"base_learning_rate={BASE_LEARNING_RATE}", "learning_rate_scaling=sqrt", f"weight_decay={WEIGHT_DECAY}"),
]

Weights = dict[str, tf.Variable]


def normalised(x: tf.Tensor, weights: Weights, name: str) -> tf.Tensor:
    axes = list(range(len(x.shape) - 1))
    mean, variance = tf.nn.moments(x, axes)
    x = (x - mean) / tf.sqrt(variance + 1e-5) * weights[f"{name}/gamma"]
    return x + weights[f"{name}/beta"] if f"{name}/beta" in weights else x


def convolved(x: tf.Tensor, weights: Weights, name: str, stride: int = 1) -> tf.Tensor:
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
                x = normalised(convolved(x[:, ::stride, ::stride], weights, f"{name}_shortcut"), weights, f"{name}_shortcut")
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


def transcribed(
    config, data: str, states: dict[int, dict[str, np.ndarray]]
) -> tuple[np.ndarray, dict[int, dict[str, np.ndarray]]]:
    """Returns the loss of every step, [STEPS] float64, and u and the momentum of every weight after each step of `states`.

    `states` has arrays by name, after so many steps; from each of them it goes on anew.
    """
    manifest = read_manifest(data)
    variables = {
        name: tf.Variable(value.astype(np.float64))
        for name, value in states[0].items()
        if name.removeprefix("momentum/").split("/")[0] in ("encoder", "projection", "u") and "moving" not in name
    }
    weights = {name: variable for name, variable in variables.items() if f"momentum/{name}" in variables}
    u = variables["u"]

    @tf.function(autograph=False)
    def step(images: tf.Tensor, ids: tf.Tensor, rate: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss, stored = surrogate(projections(images, weights), tf.gather(u, ids))
        gradients = tape.gradient(loss, weights)
        for name, weight in weights.items():
            lars(weight, variables[f"momentum/{name}"], gradients[name], rate)
        u.scatter_nd_update(ids[:, None], stored)
        return loss

    losses, ends = [], {}
    for number, batch in enumerate(training_batches(config, data, manifest, 0).take(STEPS)):
        if number in states:
            for name, variable in variables.items():
                variable.assign(states[number][name])
        views, draws = (tf.concat([batch[name][:, 0], batch[name][:, 1]], 0) for name in ("views", "draws"))
        images = tf.cast(augment(views, draws, config.views.color_jitter_strength, config.views.blur), tf.float64)
        losses.append(step(images, batch["image_id"], tf.constant(learning_rate(number), tf.float64)).numpy())
        if number + 1 in states:
            ends[number + 1] = {name: variable.numpy() for name, variable in variables.items() if name not in weights}
    return np.array(losses), ends


@pytest.mark.thorough
def test_200_steps_have_the_losses_of_the_formulas_in_float64(dataset, tmp_path, monkeypatch):
    """In parts of 20, each from the trainer's checkpoint before it: what rounding does to a ReLU grows from step to step."""
    config = resolve("demo", SETTINGS)
    monkeypatch.setattr(trainer.train, "create_train_state", lambda *arguments: lift(create_train_state(*arguments)))
    begin = lift(create_train_state(config, IMAGES, read_manifest(str(dataset)).num_classes)).arrays()
    ours = []
    train(config, str(dataset), str(tmp_path), log_metrics=lambda metrics, _: ours.append(metrics["train/contrastive_loss"]))
    stored = [checkpoints.load(path) for path in checkpoints.paths(str(tmp_path))]
    theirs, ends = transcribed(config, str(dataset), {0: begin} | {one.step: one.arrays for one in stored})
    assert list(ends) == [*range(20, 201, 20), STEPS]
    assert len(ours) == STEPS == 201
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.mean(theirs[-20:]) < np.mean(theirs[:20]) - 0.05
    for checkpoint in stored:
        end = ends[checkpoint.step]
        np.testing.assert_allclose(checkpoint.arrays["u"], end.pop("u"), rtol=1e-3)
        sizes = {name: np.linalg.norm(value) for name, value in end.items()}
        # What a beta adds where no ReLU cuts, the next BN takes back: its gradient is what equal sums leave of each other.
        scales = {name: max(sizes.values()) if name.endswith("/beta") else size for name, size in sizes.items()}
        apart = {name: np.linalg.norm(checkpoint.arrays[name] - end[name]) / scale for name, scale in scales.items()}
        assert np.median(list(apart.values())) < 0.0005, apart
        assert max(apart.values()) < 0.005, apart
