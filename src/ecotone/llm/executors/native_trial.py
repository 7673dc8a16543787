"""Run as a file in a process of its own: one product by a freshly compiled library, raw bytes in and out.

    python native_trial.py library.so < (outputs, inputs, rows, bits as int32; packed matrix; float32 activations)

Imports nothing of ours and no torch, so that a trial takes no time; who called it judges the product.
"""

from __future__ import annotations

import ctypes
import struct
import sys

HEAD = struct.Struct("<4i")


class Matrix(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int32), ("inputs", ctypes.c_int32), ("bits", ctypes.c_int32),
    ]  # fmt: skip


def main() -> None:
    """Read a product's operands from standard input and write the product (rows, outputs), float32."""
    content = sys.stdin.buffer.read()
    outputs, inputs, rows, bits = HEAD.unpack_from(content)
    split = len(content) - 4 * rows * inputs
    packed = ctypes.create_string_buffer(content[HEAD.size : split])
    x = ctypes.create_string_buffer(content[split:])
    y = ctypes.create_string_buffer(4 * rows * outputs)
    matrix = Matrix(ctypes.addressof(packed), None, outputs, inputs, bits)
    multiply = ctypes.CDLL(sys.argv[1]).ecotone_multiply
    multiply.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32]
    multiply.restype = None
    multiply(ctypes.byref(matrix), x, rows, y, 1)
    sys.stdout.buffer.write(y.raw[: 4 * rows * outputs])


if __name__ == "__main__":
    main()
