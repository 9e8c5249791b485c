"""A network whose ReLUs rounding does not turn, for tests that compare two ways to compute one step."""

from collections.abc import Mapping

import tensorflow as tf

from trainer.state import TrainState


def lift(state: TrainState) -> TrainState:
    """Raises the offsets of encoder and projection, and returns `state`."""
    raise_offsets({name: variable for name, variable in state.variables().items() if name.startswith(("encoder", "projection"))})
    return state


def raise_offsets(variables: Mapping[str, tf.Variable]) -> None:
    """Sets the beta of every BN to 3.

    Then about one in 700 values before a ReLU is negative, and hardly one so close to zero that rounding decides on which side.
    How a machine rounds depends on its number of cores, and one ReLU that turns outweighs all else by which two ways may differ.
    """
    for name, variable in variables.items():
        if name.endswith("/beta"):
            variable.assign(variable * 0 + 3)
