"""The network and the frames of the demo: TileNet names the photograph in each 32x32 tile of a 224x224 frame.

Fully convolutional: [n, 3, 224, 224] pixels in [0, 1] in, [n, 10, 7, 7] logits out. It is shaped for cutting: a light
start at strides 2 and 4, a narrow map of 16 channels at stride 8, most of the work behind it, a second narrow map of 24
channels at stride 16. Weights (examples/train_tiles.py makes them), early exits (examples/train_tile_exits.py) and frames
lie in ecotone/assets; see its README.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from ecotone.units import EcotoneError

__all__ = [
    "ASSETS",
    "EXITS",
    "LABELS",
    "TileNet",
    "example_inputs",
    "frame_paths",
    "frames",
    "read_frame",
    "tile_accuracy",
    "tilenet",
]

ASSETS = Path(__file__).resolve().parents[1] / "assets"
EXITS = ASSETS / "tilenet.exits.safetensors"
LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class _Residual(nn.Module):
    """Two 3x3 convolutions and a skip, ReLU after the sum: what leaves is sparse and not negative."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _convolution(channels, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.second(self.first(x))))


class TileNet(nn.Module):
    """[n, 3, 32 h, 32 w] pixels in [0, 1] -> [n, 10, h, w] logits, one column per tile."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Sequential(_convolution(3, 24, stride=2), _convolution(24, 48, stride=2), _Residual(48))
        self.narrow = _convolution(48, 16, stride=2)  # [n, 16, 28, 28]: 12 times fewer values than the frame
        self.middle = nn.Sequential(_convolution(16, 96), _Residual(96), _Residual(96))
        self.waist = _convolution(96, 24, stride=2)  # [n, 24, 14, 14]: 32 times fewer
        self.end = nn.Sequential(_convolution(24, 128), _Residual(128), nn.AvgPool2d(2), nn.Conv2d(128, len(LABELS), 1))

    def forward(self, frame: Tensor) -> Tensor:
        logits: Tensor = self.end(self.waist(self.middle(self.narrow(self.start(frame)))))
        return logits


def tilenet() -> TileNet:
    """TileNet with the trained weights (float16 on disk, float32 here), in evaluation mode; EcotoneError if they lack."""
    path, net = ASSETS / "tilenet.safetensors", TileNet()
    if not path.is_file():
        raise EcotoneError(f"weights {path} are missing; install Ecotone again or run examples/train_tiles.py")
    net.load_state_dict(
        {name: value.float() if value.is_floating_point() else value for name, value in load_file(path).items()}
    )
    return net.eval()


def frame_paths() -> tuple[Path, ...]:
    """The shipped frames, in the order of their labels."""
    return tuple(sorted((ASSETS / "frames").glob("*.webp")))


def read_frame(path: Path) -> Tensor:
    """One picture as [1, 3, height, width] pixels in [0, 1]."""
    with Image.open(path) as picture:
        size, data = picture.size, bytearray(picture.convert("RGB").tobytes())
    pixels = torch.frombuffer(data, dtype=torch.uint8).reshape(1, size[1], size[0], 3)
    return pixels.permute(0, 3, 1, 2).float().div(255).contiguous()


def frames(count: int | None = None) -> tuple[Tensor, Tensor]:
    """The first `count` shipped frames (all: None): [n, 3, 224, 224] pixels in [0, 1] and labels [n, 7, 7] int64."""
    paths = frame_paths()[:count]
    labels = json.loads((ASSETS / "frames" / "labels.json").read_text())
    return torch.cat([read_frame(path) for path in paths]), torch.tensor([labels[path.name] for path in paths])


def bundled() -> SimpleNamespace:
    """The network with all that the command line wants to know of it: `ecotone.cli.demo_model:bundled`."""
    size = {"height": 224, "width": 224}
    return SimpleNamespace(module=tilenet(), example_inputs=example_inputs(), labels=LABELS, preprocess=size, exits=EXITS)


def example_inputs() -> tuple[Tensor]:
    """The arguments to capture TileNet with: the first frame, [1, 3, 224, 224]."""
    return (frames(1)[0],)


@torch.inference_mode()
def tile_accuracy(net: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """Share of tiles that `net` names right, in [0, 1]; frames run one at a time."""
    right = sum(int((net(frame[None])[0].argmax(0) == truth).sum()) for frame, truth in zip(pixels, labels, strict=True))
    return right / labels.numel()
