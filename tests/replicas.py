"""Five steps on a number of replicas, in a process of their own: replicas.py DATA REPLICAS[:fuses] OUTPUT.npz BEGUN key=value ...

With `:fuses` they work as on a device whose compiler fuses, a TPU. BEGUN is the output of another such run, whose state after
each step the next one begins with, or `-`. The network has two blocks, which are soon compiled, and no layer of few pixels, whose
ReLUs weigh much when rounding turns one.

TensorFlow makes its devices once, and its collectives confuse the strategies of one process with each other.
"""

import sys

import numpy as np
import tensorflow as tf

from trainer import encoder
from trainer.distribution import Replicas
from trainer.input_pipeline import training_batches
from trainer.presets import resolve
from trainer.records import read_manifest
from trainer.train import create_train_state, make_train_step


class FusingReplicas(Replicas):
    fuses = True


def main(data_dir: str, replicas: int, fuses: bool, output: str, begun: str, overrides: list[str]) -> None:
    devices = [tf.config.LogicalDeviceConfiguration()] * replicas
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)
    encoder._BLOCKS.update({10: (1, 1), 50: (1, 1)})
    config, manifest = resolve("demo", overrides), read_manifest(data_dir)
    names = [f"CPU:{i}" for i in range(replicas)]
    strategy = tf.distribute.MirroredStrategy(names) if replicas > 1 else tf.distribute.get_strategy()
    with strategy.scope():
        kind = FusingReplicas() if fuses else Replicas()
        state = create_train_state(config, manifest.splits["train"].records, manifest.num_classes, kind)
    train_step = make_train_step(config, state, strategy)
    batches = iter(
        strategy.distribute_datasets_from_function(
            lambda context: training_batches(config, data_dir, manifest, 0, replicas=replicas)
        )
    )
    kept: dict[str, np.ndarray] = {}
    states = np.load(begun) if begun != "-" else {}
    for step in range(5):
        if states and step > 0:
            for name, variable in state.variables().items():
                variable.assign(states[f"{step - 1} state {name}"])
        kept |= {f"{step} metric {name}": value.numpy() for name, value in train_step(next(batches)).items()}
        kept |= {f"{step} state {name}": array for name, array in state.arrays().items()}
        for name, variable in state.variables().items():
            copies = [copy.numpy() for copy in strategy.experimental_local_results(variable)]
            assert len(copies) == replicas
            assert all(np.array_equal(copy, copies[0]) for copy in copies), name
    np.savez(output, **kept)


if __name__ == "__main__":
    count, _, how = sys.argv[2].partition(":")
    main(sys.argv[1], int(count), how == "fuses", *sys.argv[3:5], sys.argv[5:])
