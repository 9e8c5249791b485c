"""Evaluates a checkpoint on one replica and on several: python -m support.evaluations DATA CHECKPOINT FOLDER REPLICAS SETTING ...

REPLICAS is numbers with commas between. FOLDER gets a folder for each, with what `linear_eval` writes, and, as
`fine-tuned.npz`, the weights after two steps of fine-tuning of a network whose ReLUs rounding does not turn.
"""

import os
import sys
import traceback
from pathlib import Path

import numpy as np
import tensorflow as tf

from eval.measure.features import load_encoder
from eval.measure.linear_eval import linear_eval
from eval.measure.supervised import Recipe, train_classifier
from support.lifted import raise_offsets
from trainer import checkpoint as checkpoints
from trainer.config import override
from trainer.folder import read_config
from trainer.shared.records import read_manifest
from trainer.state import model_variables


def evaluate(data: str, checkpoint: str, output: Path, replicas: int, overrides: list[str]) -> None:
    devices = [tf.config.LogicalDeviceConfiguration()] * replicas
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)
    names = [f"CPU:{i}" for i in range(replicas)]
    strategy = tf.distribute.MirroredStrategy(names) if replicas > 1 else tf.distribute.get_strategy()
    linear_eval(data, checkpoint, str(output), overrides, strategy=strategy)

    config = override(read_config(checkpoint)[0], overrides)
    with strategy.scope():
        encoder = load_encoder(config, checkpoints.load_latest(checkpoint))
        raise_offsets(model_variables("encoder", encoder))
    recipe = Recipe(num_images=24, epochs=1, batch_size=12, base_learning_rate=1.0, seed=0, frozen=False)
    head = train_classifier(encoder, config, data, read_manifest(data), recipe, np.arange(24), strategy=strategy)
    named = model_variables("encoder", encoder) | model_variables("classifier", head)
    np.savez(output / "fine-tuned.npz", **{name: variable.numpy() for name, variable in named.items()})


if __name__ == "__main__":
    data, checkpoint, folder, counts, *overrides = sys.argv[1:]
    for count in map(int, counts.split(",")):
        child = os.fork()
        if not child:
            try:
                evaluate(data, checkpoint, Path(folder, str(count)), count, overrides)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0, count
