"""Tensors <-> bytes with a stated error: quantise, pack, entropy-code; pictures; bodies of frontiers; frames."""

from ecotone.codec.body import HasSpec, pack, unpack
from ecotone.codec.catalogue import CANDIDATES, IMAGE_CANDIDATES, CodecError, CodecInfo, catalogue, info
from ecotone.codec.frame import FrameError
from ecotone.codec.image import ImageSpec, is_picture
from ecotone.codec.tensors import decode, encode, error_bound

__all__ = [
    "CANDIDATES", "IMAGE_CANDIDATES", "CodecError", "CodecInfo", "FrameError", "HasSpec", "ImageSpec", "catalogue", "decode",
    "encode", "error_bound", "info", "is_picture", "pack", "unpack",
]  # fmt: skip
