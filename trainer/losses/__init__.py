"""The contrastive losses, one module each. `loss=NAME` (`trainer.settings.LossSettings`) selects the module NAME.

A new loss takes a module here, whose `make` returns it, and the module's name among the choices of
`trainer.settings.LossSettings.name`. Its own settings are fields of `LossSettings`, marked `OnlyWith`.

Conventions: a replica has b anchors of a global batch of B images. `z1` and `z2`, [b, d] float32, are the L2-normalised
projections of the two views of the anchors. `all_z1` and `all_z2`, [B, d] float32, are those of the global batch. `positions`,
[b] int, holds the index of each anchor in the global batch. On one replica, z1 is all_z1 and positions are 0..B-1. The negatives
of an anchor are both views of every OTHER image of the global batch: 2(B-1). Gradients flow through anchors and negatives.
"""

import importlib
import pkgutil

from trainer.losses.loss import InGroups, Loss
from trainer.settings import LossSettings

_MODULES = {one.name: importlib.import_module(f"{__name__}.{one.name}") for one in pkgutil.iter_modules(__path__)}


def make_loss(settings: LossSettings, group_size: int = 0) -> Loss:
    """Returns the loss `settings.name`, made by the function `make` of its module.

    With `group_size` above 0, negatives come from groups of so many images (`trainer.losses.loss.InGroups`).
    """
    made: Loss = _MODULES[settings.name].make(settings)
    return InGroups(made, group_size) if group_size else made
