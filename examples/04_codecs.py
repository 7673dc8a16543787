"""What a frontier weighs in every codec, and what the codec does to the answer.

python examples/04_codecs.py [frames]
"""

import sys

import torch

from ecotone import codec
from ecotone.cli.demo_model import example_inputs, frames, tilenet
from ecotone.model import capture

CUT = 5  # behind the narrow map of 16 channels
NAMES = ("fp32", "fp16", "int8", "int8+zstd", "int4", "int4c", "int4+zstd", "int3c+zstd", "int2c+zstd")


def main(count: int) -> None:
    torch.set_num_threads(1)
    captured = capture(tilenet(), example_inputs(), name="TileNet")
    head, tail = captured.segment(0, CUT).module(), captured.segment(CUT, captured.graph.num_blocks).module()
    pixels, labels = frames(count)
    with torch.inference_mode():
        frontiers = [head(frame[None]) for frame in pixels]
        print(f"cut {CUT}: {tuple(frontiers[0][0].shape)}\ncodec        bytes per frame  bits per value  tiles right")
        for name in NAMES:
            right = size = 0
            for tensors, truth in zip(frontiers, labels, strict=True):
                body = codec.pack([("map", tensor) for tensor in tensors], name)
                size += len(body)
                right += int((tail(*codec.unpack(body))[0][0].argmax(0) == truth).sum())
            values = sum(t.numel() for tensors in frontiers for t in tensors)
            print(f"{name:12} {size / count:15,.0f} {8 * size / values:15.2f} {right / labels.numel():12.1%}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8)
