"""Run as a process of its own: multiplies by a freshly compiled library and exits with 1 where the product is wrong."""

from __future__ import annotations

import ctypes
import sys

import torch

from ecotone.llm.executors.native_library import Matrix, load_library
from ecotone.llm.executors.native_packing import pack_matrix, unpack_matrix


def main() -> int:
    """0 where every precision multiplies as its unpacked weights do."""
    made = load_library(sys.argv[1])
    weight_NK, x_TK = torch.randn(40, 96), torch.randn(5, 96)
    for bits in (4, 8, 16, 32):
        packed, y_TN = pack_matrix(weight_NK, bits), torch.empty(5, 40)
        matrix = Matrix(packed.data_ptr(), None, 40, 96, bits)
        made.ecotone_multiply(ctypes.byref(matrix), x_TK.data_ptr(), 5, y_TN.data_ptr(), 1)
        right_TN = x_TK @ unpack_matrix(packed, 40, 96, bits).t()
        if not float((y_TN - right_TN).norm()) < 0.02 * float(right_TN.norm()):
            print(f"{bits}-bit product is wrong by {float((y_TN - right_TN).norm() / right_TN.norm()):.3f}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
