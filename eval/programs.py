"""The forward pass of an evaluation as a program for XLA. STUB: the real one takes its place when branches are merged."""

import tensorflow as tf

from trainer.config import Config
from trainer.encoder import make_encoder
from trainer.lowering import OneOfMany, Program, to_hlo


def lower_forward(config: Config, images: int) -> Program:
    """Returns the frozen encoder's pass over `images`, [images, S, S, 3] uint8, on one replica."""
    encoder = make_encoder(config, OneOfMany(1))
    shape = (images, config.image_size, config.image_size, 3)

    @tf.function(autograph=False, jit_compile=True)
    def forward(pixels: tf.Tensor) -> tf.Tensor:
        return encoder(tf.cast(pixels, tf.float32) / 255.0, training=False)

    hlo = to_hlo(forward, [tf.TensorSpec(shape, tf.uint8)])
    arguments = {"batch/image": (shape, "uint8")}
    arguments |= {f"encoder/{one.path}": (tuple(one.shape), str(one.dtype)) for one in encoder.variables}
    return Program(hlo, arguments, (), ())
