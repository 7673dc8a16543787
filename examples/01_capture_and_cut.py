"""Capture a PyTorch model as a graph of blocks, cut it anywhere, and see that the pieces give the very same answer.

python examples/01_capture_and_cut.py
"""

import torch

from ecotone.cli.demo_model import example_inputs, tilenet
from ecotone.model import capture


def main() -> None:
    torch.set_num_threads(1)
    captured = capture(tilenet(), example_inputs(), name="TileNet")
    graph = captured.graph
    total = graph.segment_flop(0, graph.num_blocks)
    print(f"{graph.name}: {graph.num_blocks} blocks, {total / 1e9:.2f} GFLOP")
    print("cut  before block       work before  tensors  bytes that cross")
    for position in range(graph.num_blocks + 1):
        name = graph.blocks[position].name if position < graph.num_blocks else "(the end)"
        share, crossing = graph.segment_flop(0, position) / total, len(graph.frontier(position))
        print(f"{position:3}  {name:18} {share:11.0%} {crossing:8} {graph.frontier_bytes(position):17,}")

    inputs = captured.flatten_inputs(example_inputs())
    whole = captured.reference(inputs)
    with torch.inference_mode():
        for position in range(graph.num_blocks + 1):
            head, tail = captured.segment(0, position).module(), captured.segment(position, graph.num_blocks).module()
            pieces = tail(*head(*inputs))
            assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True)), position
    print("every cut: the two pieces give the same bits as the whole")


if __name__ == "__main__":
    main()
