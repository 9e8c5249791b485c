"""The contrastive losses, a module each.

A new loss takes a module here, whose `make` returns it, and the module's name among the choices of
`trainer.settings.LossSettings.name`. Settings of its own are fields of `LossSettings`, marked `OnlyWith`.

Conventions of all of them. `z1` and `z2`, [b, d] float32, are the L2-normalised projections of the two views of b anchors, which
are part of a global batch of B images; `all_z1` and `all_z2`, [B, d], are those of the whole batch, and `positions`, [b] int,
says where in it an anchor is. On one replica both are the same and positions is 0..B-1. An anchor's negatives are both views of
every OTHER image of the global batch, 2(B-1) of them. Gradients flow through anchors and negatives alike.
"""

import importlib
import pkgutil

from trainer.losses.loss import Loss
from trainer.settings import LossSettings

_MODULES = {one.name: importlib.import_module(f"{__name__}.{one.name}") for one in pkgutil.iter_modules(__path__)}


def make_loss(settings: LossSettings) -> Loss:
    """Returns the loss that `settings` name: what `make` of the module of that name returns."""
    made: Loss = _MODULES[settings.name].make(settings)
    return made
