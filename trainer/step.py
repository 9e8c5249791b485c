"""The train step: from a batch of views to the loss, its gradient and the next state."""

from collections.abc import Callable

import tensorflow as tf

from trainer.augmentation import augment
from trainer.config import Config
from trainer.distribution import Replicas
from trainer.input_pipeline import Batch
from trainer.losses import make_loss
from trainer.losses.loss import Projections, alignment, uniformity_kernel
from trainer.optimizer import learning_rate
from trainer.state import TrainState


def make_train_step(
    config: Config, state: TrainState, strategy: tf.distribute.Strategy | None = None, compiled: bool = False
) -> Callable[[Batch], dict[str, tf.Tensor]]:
    """Returns a function that updates `state` with a batch of `training_batches`. It returns scalars by metric name.

    On R replicas of `strategy`, by default TensorFlow's current one, each replica takes a batch of 1/R of the global batch. If
    `compiled`, XLA compiles the whole step.
    """
    strategy = strategy or tf.distribute.get_strategy()
    replica_step = make_replica_step(config, state, Replicas())

    @tf.function(autograph=False, jit_compile=compiled or None)
    def train_step(batch: Batch) -> dict[str, tf.Tensor]:
        metrics = strategy.run(replica_step, args=(batch,))
        return {name: strategy.experimental_local_results(value)[0] for name, value in metrics.items()}

    return train_step


def make_replica_step(config: Config, state: TrainState, replicas: Replicas) -> Callable[[Batch], dict[str, tf.Tensor]]:
    """Returns the train step of one of `replicas`, a function of its part of the global batch.

    Negatives come from all replicas, and gradients flow back to all of them. With `contrast_batch_size`, they come from this one.
    """
    num_images = state.u.shape[0]
    loss_of = make_loss(config.loss, config.optimizer.contrast_batch_size)

    def contrast(projections: Projections, image_id: tf.Tensor) -> tf.Tensor:
        if not loss_of.vectors:
            return loss_of(projections, {})[0]
        # Every replica reads and writes the entries of the global batch, so that u is the same on all replicas.
        every_id = replicas.gather(image_id)
        loss, entries = loss_of(projections, {name: _entries(state.by_image[name], every_id) for name in loss_of.vectors})
        every_entry = replicas.gather(tf.stack(list(entries.values()), axis=1))
        for name, values in zip(entries, tf.unstack(every_entry, axis=1), strict=True):
            state.by_image[name].scatter_update(tf.IndexedSlices(values, every_id))
        return loss

    def replica_step(batch: Batch) -> dict[str, tf.Tensor]:
        per_replica = config.optimizer.global_batch_size // replicas.count
        ghosts = per_replica // (config.optimizer.ghost_batch_size or per_replica)
        positions = replicas.index() * per_replica + tf.range(per_replica)
        both = tf.concat([batch["views"][:, 0], batch["views"][:, 1]], axis=0)
        draws = tf.concat([batch["draws"][:, 0], batch["draws"][:, 1]], axis=0)
        labels = tf.tile(batch["label"], [2])
        images = augment(both, draws, config.views.color_jitter_strength, config.views.blur)
        rate = learning_rate(config.optimizer, num_images, state.step)
        with tf.GradientTape() as tape:
            # The rows of a ghost batch follow each other in the networks, and only there.
            by_ghost = state.encoder(_by_ghost(images, ghosts), training=True)
            projected = _by_view(state.projection(by_ghost, training=True), ghosts)
            projected = tf.math.l2_normalize(projected, axis=1)
            features = _by_view(by_ghost, ghosts)
            z1, z2 = tf.split(projected, 2)
            all_z1, all_z2 = tf.unstack(replicas.gather(tf.stack([z1, z2], axis=1)), axis=1)
            contrastive = contrast(Projections(z1, z2, all_z1, all_z2, positions), tf.cast(batch["image_id"], tf.int32))
            logits = state.classifier(tf.stop_gradient(features))
            supervised = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
            kernel_decay = config.optimizer.weight_decay * tf.nn.l2_loss(state.classifier.trainable_variables[0].value)
            # The loss of a replica is its share of the mean over the global batch, because gradients are summed.
            loss = (contrastive + supervised + kernel_decay) / replicas.count
        gradients = replicas.sum(tape.gradient(loss, state.trainable))
        state.optimizer.apply(gradients, rate, state.step)
        state.step.assign_add(1)
        means = {
            "train/contrastive_loss": contrastive,
            "train/online_loss": supervised,
            "train/online_top_1_accuracy": tf.reduce_mean(tf.cast(tf.argmax(logits, 1) == labels, tf.float32)),
            "train/alignment": alignment(z1, z2),
            "train/uniformity": uniformity_kernel(z1, all_z1, positions),
        }
        values = tf.unstack(replicas.mean(tf.stack(list(means.values()))))
        metrics = dict(zip(means, values, strict=True))
        return metrics | {
            "train/uniformity": tf.math.log(metrics["train/uniformity"]),
            "train/learning_rate": rate,
            "train/gradient_norm": tf.linalg.global_norm(gradients),
        }

    return replica_step


def _by_ghost(values: tf.Tensor, ghosts: int) -> tf.Tensor:
    """Reorders rows, [2 n, ...], from the first views and then the second ones, to one ghost batch after the other.

    A ghost batch has the first views of consecutive images, and the second views of images that are `ghosts` apart. So two views
    of one image are in the same ghost batch about as often as those of two images. If they always were, a network could tell
    them from other images by the statistics that they share, and would learn that (He et al. 2020, section 3.3).
    """
    if ghosts == 1:
        return values
    first, second = tf.split(values, 2)
    first = tf.reshape(first, [ghosts, -1, *values.shape[1:]])
    second = _transposed(tf.reshape(second, [-1, ghosts, *values.shape[1:]]))
    return tf.reshape(tf.concat([first, second], axis=1), values.shape)


def _by_view(values: tf.Tensor, ghosts: int) -> tf.Tensor:
    """Undoes `_by_ghost`."""
    if ghosts == 1:
        return values
    first, second = tf.split(tf.reshape(values, [ghosts, -1, *values.shape[1:]]), 2, axis=1)
    return tf.concat([tf.reshape(part, [-1, *values.shape[1:]]) for part in (first, _transposed(second))], axis=0)


def _transposed(values: tf.Tensor) -> tf.Tensor:
    """Exchanges the first two axes."""
    return tf.transpose(values, [1, 0, *range(2, len(values.shape))])


def _entries(vector: tf.Variable, image_id: tf.Tensor) -> tf.Tensor:
    # With several replicas, tf.gather would first read the whole variable.
    return tf.raw_ops.ResourceGather(resource=vector.handle, indices=image_id, dtype=vector.dtype)
