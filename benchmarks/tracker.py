"""An SSD-MobileNet-shaped tracker at 300x300: MobileNetV1 backbone, six SSD scales, and tracking as a tensor computation.

Shapes after MobileNet (1704.04861) and SSD (1512.02325) as in SSD-MobileNetV1/COCO: 1917 anchors, 91 classes, 1x1 heads;
the network that Edge-PRUNE (2204.12947) splits is of this kind. Weights are seeded, as in models.py: times are real,
detections are not. Hard non-maximum suppression gives results of a size that depends on the data and jumps with the
least change, so the tracker is soft: each track moves to the mean box of the detections near it, weighted by overlap and
score; each scale proposes one new track. Outputs are small (boxes and scores), as a tracker's are.
"""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.models import conv, settle

__all__ = ["NUM_TRACKS", "SIZE", "tracker", "tracks"]

SIZE, NUM_CLASSES, NUM_TRACKS = 300, 91, 16
_BACKBONE = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
_FIRST_SCALE = 11  # the depthwise block whose 19x19x512 output feeds the first head
_EXTRAS = ((256, 512), (128, 256), (128, 256), (64, 128))
_SIDES = (19, 10, 5, 3, 2, 1)
_ANCHORS = (3, 6, 6, 6, 6, 6)
_RATIOS = (1.0, 2.0, 0.5, 3.0, 1 / 3)


def tracks(count: int = NUM_TRACKS, seed: int = 0) -> torch.Tensor:
    """Boxes of the last frame (count, 4): centre x and y, width, height, in shares of the picture."""
    generator = torch.Generator().manual_seed(seed)
    centre = 0.2 + 0.6 * torch.rand(count, 2, generator=generator)
    return torch.cat([centre, 0.1 + 0.2 * torch.rand(count, 2, generator=generator)], 1)


def _separable(inside: int, outside: int, stride: int) -> nn.Sequential:
    depthwise = conv(inside, inside, 3, stride, inside, nn.ReLU6(inplace=True))
    return nn.Sequential(depthwise, conv(inside, outside, 1, 1, 1, nn.ReLU6(inplace=True)))


def _anchors() -> torch.Tensor:
    """(1917, 4): centre and size of every anchor, scale after scale."""
    rows = []
    for level, (side, count) in enumerate(zip(_SIDES, _ANCHORS, strict=True)):
        scale = 0.2 + 0.75 * level / (len(_SIDES) - 1)
        shapes = [(scale * r**0.5, scale / r**0.5) for r in _RATIOS] + [(scale * 1.1, scale * 1.1)]
        for y in range(side):
            for x in range(side):
                rows += [((x + 0.5) / side, (y + 0.5) / side, w, h) for w, h in shapes[:count]]
    return torch.tensor(rows)


class _Tracker(nn.Module):
    """(frame (1, 3, 300, 300), tracks (T, 4)) -> tracks (T, 5) and one proposal a scale (6, 5): box and score."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 32, 3, 2, 1, nn.ReLU6(inplace=True))
        inside, body = 32, []
        for outside, stride in _BACKBONE:
            body.append(_separable(inside, outside, stride))
            inside = outside
        self.low, self.high = nn.Sequential(*body[:_FIRST_SCALE]), nn.Sequential(*body[_FIRST_SCALE:])
        extras = []
        for squeezed, outside in _EXTRAS:
            reduce = conv(inside, squeezed, 1, 1, 1, nn.ReLU6(inplace=True))
            extras.append(nn.Sequential(reduce, conv(squeezed, outside, 3, 2, 1, nn.ReLU6(inplace=True))))
            inside = outside
        self.extras = nn.ModuleList(extras)
        channels = (512, 1024, *(outside for _, outside in _EXTRAS))
        self.boxes = nn.ModuleList(nn.Conv2d(c, a * 4, 1) for c, a in zip(channels, _ANCHORS, strict=True))
        self.classes = nn.ModuleList(nn.Conv2d(c, a * NUM_CLASSES, 1) for c, a in zip(channels, _ANCHORS, strict=True))
        self.register_buffer("anchors", _anchors())

    def features(self, frame: torch.Tensor) -> list[torch.Tensor]:
        """The six feature maps, finest first."""
        found = [self.low(self.stem(frame))]
        found.append(self.high(found[0]))
        for extra in self.extras:
            found.append(extra(found[-1]))
        return found

    def forward(self, frame: torch.Tensor, old: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.features(frame)
        boxes, scores, proposals = [], [], []
        start = 0
        for level, x in enumerate(features):
            offsets = self.boxes[level](x).permute(0, 2, 3, 1).reshape(-1, 4)
            score = torch.softmax(self.classes[level](x).permute(0, 2, 3, 1).reshape(-1, NUM_CLASSES), 1)[:, 1:].amax(1)
            anchors = self.anchors[start : start + offsets.shape[0]]
            start += offsets.shape[0]
            box = _decode(offsets, anchors)
            weight = torch.softmax(8.0 * score, 0)
            proposals.append(torch.cat([weight @ box, (weight * score).sum().reshape(1)]))
            boxes.append(box)
            scores.append(score)
        return _moved(old, torch.cat(boxes), torch.cat(scores)), torch.stack(proposals)


def _decode(offsets: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """SSD's box coding, with its scale factors 10 and 5; sizes are kept within e^2 of the anchor's."""
    centre = anchors[:, :2] + offsets[:, :2] * 0.1 * anchors[:, 2:]
    return torch.cat([centre, anchors[:, 2:] * torch.exp((offsets[:, 2:] * 0.2).clamp(-2.0, 2.0))], 1)


def _corners(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2


def _moved(old: torch.Tensor, boxes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Each track's box and score in this frame, from all detections by overlap (T, 1917) and score."""
    old_low, old_high = _corners(old)
    low, high = _corners(boxes)
    sides = (torch.minimum(old_high[:, None], high) - torch.maximum(old_low[:, None], low)).clamp(min=0.0)
    common = sides[..., 0] * sides[..., 1]
    areas = (old[:, 2] * old[:, 3])[:, None] + boxes[:, 2] * boxes[:, 3]
    overlap = common / (areas - common + 1e-6)
    weight = torch.softmax(10.0 * overlap + torch.log(scores + 1e-6), 1)
    box = 0.3 * old + 0.7 * (weight @ boxes)
    return torch.cat([box, (weight @ scores)[:, None]], 1)


def tracker(seed: int = 0) -> nn.Module:
    """The network in eval mode: 6.8 M parameters, 2.5 GFLOP for a frame of 1x3x300x300."""
    model = _Tracker()
    return settle(model, seed, SIZE, model.features)
