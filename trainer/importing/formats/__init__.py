"""The formats of checkpoints, a module each."""

from trainer.importing.format import Format
from trainer.importing.formats.exported import Exported
from trainer.importing.formats.lightly import Lightly
from trainer.importing.formats.moco_v3 import MoCoV3
from trainer.importing.formats.simclr_saved_model import SimCLRSavedModel
from trainer.importing.formats.simclr_tf1 import SimCLRTF1
from trainer.importing.formats.simclr_tf2 import SimCLRTF2
from trainer.importing.formats.sogclr_pytorch import SogCLRPyTorch
from trainer.importing.formats.solo_learn import SoloLearn
from trainer.importing.formats.torchvision import Torchvision
from trainer.importing.formats.vissl import VISSL

FORMATS: tuple[Format, ...] = (
    SimCLRTF2(),
    SimCLRSavedModel(),
    SimCLRTF1(),
    Exported(),
    MoCoV3(),
    SogCLRPyTorch(),
    SoloLearn(),
    Lightly(),
    VISSL(),
    Torchvision(),
)
"""The formats in the order in which they are tried."""
