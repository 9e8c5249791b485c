"""The contrastive losses: a module each, found by its name, which is also its choice in `trainer.settings.LossSettings`.

Conventions of all of them. `z1` and `z2`, [b, d] float32, are the L2-normalised projections of the two views of b anchors, which
are part of a global batch of B images; `all_z1` and `all_z2`, [B, d], are those of the whole batch, and `positions`, [b] int,
says where in it an anchor is. On one replica both are the same and positions is 0..B-1. An anchor's negatives are both views of
every OTHER image of the global batch, 2(B-1) of them. Gradients flow through anchors and negatives alike.
"""

import importlib

from trainer.losses.loss import Loss
from trainer.settings import LossSettings


def make_loss(settings: LossSettings) -> Loss:
    """Returns the loss that `settings` name: what `make` of the module of that name returns."""
    made: Loss = importlib.import_module(f"trainer.losses.{settings.name}").make(settings)
    return made
