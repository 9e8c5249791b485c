"""The devices of a step: claimed as the pipeline names them, said first, and recorded in MLflow."""

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from components import variables
from trainer.shared.progress import OnProgress

if TYPE_CHECKING:
    import tensorflow as tf

    from components.tracking import StepRun


def claimed_devices(
    run: "StepRun", on_progress: OnProgress, say: Callable[[str], None], environ: Mapping[str, str] = os.environ
) -> "tf.distribute.Strategy":
    """Returns the strategy of the devices that the step uses. Raises UserError if they are not those that it was given."""
    from trainer.distribution import claim_devices, describe_run

    on_progress("finding devices")
    strategy = claim_devices(environ.get(variables.ACCELERATOR, ""), say=say)
    run.log_devices(describe_run(strategy))
    return strategy
