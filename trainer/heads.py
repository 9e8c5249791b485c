"""The two heads on the encoder's features: the projection head of the loss, and the online linear classifier."""

import keras

from trainer.distribution import Replicas
from trainer.layers import BatchNorm, initializer


def make_projection(
    feature_dim: int,
    layers: int,
    out_dim: int,
    seed: int = 0,
    replicas: Replicas | None = None,
    hidden_dim: int = 0,
    ghost_rows: int = 0,
) -> keras.Model:
    """Returns SimCLR's projection head, from features, [B, F] float32, to projections, [B, out_dim] float32, not normalised.

    Hidden layers have `hidden_dim` units, by default F. BN follows every layer, ReLU every layer but the last; the last BN has no
    offset. BN takes its statistics over `replicas`, by default those of tf.distribute, or, with `ghost_rows` above 0, over that
    many rows of a replica's batch.
    """
    features = keras.Input((feature_dim,), name="features")
    x = features
    for layer in range(1, layers + 1):
        last = layer == layers
        name = f"dense{layer}"
        x = keras.layers.Dense(
            out_dim if last else hidden_dim or feature_dim,
            use_bias=False,
            kernel_initializer=initializer("head", seed, f"projection/{name}"),
            name=name,
        )(x)
        x = BatchNorm(center=not last, relu=not last, replicas=replicas, ghost_rows=ghost_rows, name=f"norm{layer}")(x)
    return keras.Model(features, x, name="projection")


def make_classifier(feature_dim: int, num_classes: int, seed: int = 0) -> keras.Model:
    """Returns the online linear classifier, from features, [B, F] float32, to logits, [B, num_classes] float32."""
    features = keras.Input((feature_dim,), name="features")
    dense = keras.layers.Dense(num_classes, kernel_initializer=initializer("head", seed, "classifier/dense"), name="dense")
    return keras.Model(features, dense(features), name="classifier")
