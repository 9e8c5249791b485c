"""Five steps on one replica and on several, for each of some cases: python -m support.replicas DATA FOLDER CASES

CASES is JSON: by name the number of replicas, whether several work as on a device whose compiler fuses, a TPU, and settings.
FOLDER gets NAME-one.npz and NAME-several.npz with the metrics and the state after each step; several begin each step with the
state that one had after the step before. The network has two blocks, which are soon compiled.

TensorFlow makes its devices once, and its collectives confuse the strategies of one process with each other: each run on several
is a child, the runs on one are another, and the children share the import of TensorFlow alone.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import numpy as np
import tensorflow as tf

from support.lifted import lift
from trainer import encoder
from trainer.distribution import Replicas
from trainer.input_pipeline import training_batches
from trainer.presets import resolve
from trainer.shared.records import read_manifest
from trainer.state import create_train_state
from trainer.step import make_train_step


class FusingReplicas(Replicas):
    recompute_in_backward = True


def five_steps(data_dir: str, output: Path, begun: Path | None, replicas: int, fuses: bool, overrides: list[str]) -> None:
    devices = [tf.config.LogicalDeviceConfiguration()] * replicas
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)
    encoder.BLOCKS.update({10: (1, 1), 50: (1, 1)})
    config, manifest = resolve("demo", overrides), read_manifest(data_dir)
    names = [f"CPU:{i}" for i in range(replicas)]
    strategy = tf.distribute.MirroredStrategy(names) if replicas > 1 else tf.distribute.get_strategy()
    with strategy.scope():
        kind = FusingReplicas() if fuses else Replicas()
        state = lift(create_train_state(config, manifest.splits["train"].records, manifest.num_classes, kind))
    train_step = make_train_step(config, state, strategy)
    batches = iter(
        strategy.distribute_datasets_from_function(
            lambda context: training_batches(config, data_dir, manifest, 0, replicas=replicas)
        )
    )
    kept: dict[str, np.ndarray] = {}
    states = np.load(begun) if begun else {}
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


def in_a_child(*runs: tuple) -> None:
    child = os.fork()
    if not child:
        try:
            for arguments in runs:
                five_steps(*arguments)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0, runs


if __name__ == "__main__":
    data, folder = sys.argv[1], Path(sys.argv[2])
    cases = json.loads(sys.argv[3])
    ones = {name: folder / f"{name}-one.npz" for name in cases}
    in_a_child(*((data, ones[name], None, 1, False, settings) for name, (_, _, settings) in cases.items()))
    for name, (count, as_on_a_tpu, settings) in cases.items():
        in_a_child((data, folder / f"{name}-several.npz", ones[name], count, as_on_a_tpu, settings))
