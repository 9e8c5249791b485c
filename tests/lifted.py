"""A network whose ReLUs rounding does not turn, for tests that compare two ways to compute one step."""

from trainer.train import TrainState


def lift(state: TrainState) -> TrainState:
    """Sets the beta of every BN to 3, and returns `state`.

    Then about one in 700 values before a ReLU is negative, and hardly one so close to zero that rounding decides on which side.
    How a machine rounds depends on its number of cores, and one ReLU that turns outweighs all else by which two ways may differ.
    """
    for name, variable in state.variables().items():
        if name.endswith("/beta") and name.startswith(("encoder", "projection")):
            variable.assign(variable * 0 + 3)
    return state
