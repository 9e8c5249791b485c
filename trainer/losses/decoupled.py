"""The decoupled contrastive loss (Yeh et al. 2022): NT-Xent without the positive pair in the denominator."""

from trainer.losses.nt_xent import NtXent
from trainer.settings import LossSettings


def make(settings: LossSettings) -> NtXent:
    return NtXent(settings.temperature, decoupled=True)
