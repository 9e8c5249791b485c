"""The encoder in PyTorch, from PyTorch alone. An export has this file as encoder.py, beside the weights encoder.safetensors.

    from encoder import load

    encoder = load("encoder.safetensors")    # in evaluation mode
    features = encoder(images)               # images [n, 3, S, S] float32 in [0, 1], not normalised; features [n, F]

Names of parameters are torchvision's, as far as torchvision's ResNet has the layer.
"""

import json
import struct

import torch
from torch import Tensor, nn
from torch.nn import functional

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pixels, R, G and B in [0, 1]."""
TYPES = {"F32": torch.float32, "I64": torch.int64}


class Encoder(nn.Module):
    """A ResNet (v1) from images to features. The keyword arguments are those in the metadata of encoder.safetensors."""

    def __init__(
        self,
        *,
        blocks: list[int],
        bottleneck: bool,
        width: int,
        selective_kernel_ratio: float = 0.0,
        cifar_stem: bool = False,
        pool_padding: str = "tensorflow",
        input_normalization: str = "none",
        first_shortcut: bool = True,
    ) -> None:
        super().__init__()
        self.cifar_stem, self.pool_padding = cifar_stem, pool_padding
        self.normalizes = input_normalization == "imagenet"
        ratio = selective_kernel_ratio
        if cifar_stem or not ratio:
            side = 3 if cifar_stem else 7
            self.conv1, self.bn1 = conv(3, width, side, 1 if cifar_stem else 2), norm(width)
        else:
            self.conv1, self.bn1 = conv(3, width // 2, 3, 2), norm(width // 2)
            self.conv2, self.bn2 = conv(width // 2, width // 2, 3), norm(width // 2)
            self.conv3, self.bn3 = conv(width // 2, width, 3), norm(width)
        inputs = width
        for group, count in enumerate(blocks):
            layers = []
            for block in range(count):
                stride = 2 if group and not block else 1
                projected = not block and (group > 0 or first_shortcut or bottleneck)
                layers.append(
                    Bottleneck(inputs, width * 2**group, stride, projected, ratio)
                    if bottleneck
                    else Basic(inputs, width * 2**group, stride, projected)
                )
                inputs = width * 2**group * (4 if bottleneck else 1)
            setattr(self, f"layer{group + 1}", nn.Sequential(*layers))

    def forward(self, images: Tensor) -> Tensor:
        x = images
        if self.normalizes:
            mean, deviation = (x.new_tensor(one)[:, None, None] for one in (MEAN, DEVIATION))
            x = (x - mean) / deviation
        x = torch.relu(self.bn1(self.conv1(x)))
        if hasattr(self, "conv3"):
            x = torch.relu(self.bn2(self.conv2(x)))
            x = torch.relu(self.bn3(self.conv3(x)))
        if not self.cifar_stem:
            x = self.pool(x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean(dim=(2, 3))

    def pool(self, x: Tensor) -> Tensor:
        if self.pool_padding == "torch":
            return functional.max_pool2d(x, 3, 2, padding=1)
        height, width = x.shape[2:]
        # TensorFlow's padding. What is padded is not negative, so zeros never win.
        return functional.max_pool2d(functional.pad(x, (width % 2, 1, height % 2, 1)), 3, 2)


class Basic(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, projected: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 3, stride), norm(width)
        self.conv2, self.bn2 = conv(width, width, 3), norm(width)
        self.downsample = nn.Sequential(conv(inputs, width, 1, stride), norm(width)) if projected else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x)) + shortcut)


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, projected: bool, ratio: float) -> None:
        super().__init__()
        self.stride = stride
        self.selective = bool(ratio)
        self.conv1, self.bn1 = conv(inputs, width, 1), norm(width)
        self.conv2, self.bn2 = conv(width, 2 * width if ratio else width, 3, stride), norm(2 * width if ratio else width)
        if ratio:
            squeezed = max(int(width * ratio), 32)
            self.squeeze, self.squeeze_bn = conv(width, squeezed, 1), norm(squeezed)
            self.attend = conv(squeezed, 2 * width, 1)
        self.conv3, self.bn3 = conv(width, 4 * width, 1), norm(4 * width)
        step = 1 if ratio else stride
        self.downsample = nn.Sequential(conv(inputs, 4 * width, 1, step), norm(4 * width)) if projected else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(self.pooled(x) if self.selective else x)
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        if self.selective:
            x = self.selected(x)
        return torch.relu(self.bn3(self.conv3(x)) + shortcut)

    def pooled(self, x: Tensor) -> Tensor:
        """Averages 2x2 pixels. At stride 1, pixels at the border average those that there are, as in TensorFlow."""
        if self.stride > 1:
            return functional.avg_pool2d(functional.pad(x, (0, 1, 0, 1)), 2, self.stride)
        ones = functional.pad(torch.ones_like(x[:1, :1]), (0, 1, 0, 1))
        return functional.avg_pool2d(functional.pad(x, (0, 1, 0, 1)), 2, 1) / functional.avg_pool2d(ones, 2, 1)

    def selected(self, x: Tensor) -> Tensor:
        """Sums the two paths, weighted per channel by attention over the whole image (Li et al. 2019)."""
        paths = x.unflatten(1, (2, -1))
        seen = paths.sum(dim=1).mean(dim=(2, 3), keepdim=True)
        weights = self.attend(torch.relu(self.squeeze_bn(self.squeeze(seen)))).unflatten(1, (2, -1)).softmax(dim=1)
        return (paths * weights).sum(dim=1)


def conv(inputs: int, outputs: int, side: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, side, stride, padding=side // 2, bias=False)


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-5, momentum=0.1)


def load(path: str = "encoder.safetensors") -> Encoder:
    """Returns the encoder in a file of an export, in evaluation mode."""
    weights, metadata = read_safetensors(path)
    encoder = Encoder(**json.loads(metadata["encoder"]))
    missing, unexpected = encoder.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"{path} does not fit: missing {missing[:3]}, unexpected {unexpected[:3]}")
    return encoder.eval()


def read_safetensors(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and the metadata of a safetensors file."""
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        content = bytearray(file.read())
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, about in header.items():
        begin, end = about["data_offsets"]
        kind = TYPES[about["dtype"]]
        count = (end - begin) // kind.itemsize
        tensors[name] = torch.frombuffer(content, dtype=kind, count=count, offset=begin).reshape(about["shape"])
    return tensors, metadata
