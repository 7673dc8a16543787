"""Tensors <-> bytes with a stated error: quantise, pack, entropy-code; pictures; learned codecs; bodies; frames."""

from ecotone.codec.body import HasSpec, pack, unpack
from ecotone.codec.catalogue import CANDIDATES, IMAGE_CANDIDATES, CodecError, CodecInfo, catalogue, info
from ecotone.codec.frame import FrameError
from ecotone.codec.image import ImageSpec, is_picture
from ecotone.codec.learned import LearnedCodec, hold, holding, position_of, read_learned, release
from ecotone.codec.tensors import decode, encode, error_bound

__all__ = [
    "CANDIDATES", "IMAGE_CANDIDATES", "CodecError", "CodecInfo", "FrameError", "HasSpec", "ImageSpec", "LearnedCodec",
    "catalogue", "decode", "encode", "error_bound", "hold", "holding", "info", "is_picture", "pack", "position_of",
    "read_learned", "release", "unpack",
]  # fmt: skip
