"""Measures devices, codecs and models, fits links, trains bottlenecks. Verb: `measure`; nodes call `profile_device`."""

from ecotone.profiling.bottleneck import (
    BottleneckOptions,
    TrainedBottleneck,
    check_bottleneck,
    train_bottleneck,
    trainable_cuts,
)
from ecotone.profiling.codecs import codec_ids, learned_positions, payloads, profile_codecs
from ecotone.profiling.cuts import candidate_cuts
from ecotone.profiling.device import profile_device
from ecotone.profiling.link import LINK_PROBE_SIZES, LinkSample, fit_link, probe_sizes
from ecotone.profiling.measure import default_path, measure, profile_key
from ecotone.profiling.measurement import DeviceMeasurement, MeasureOptions, Progress

__all__ = [
    "LINK_PROBE_SIZES", "BottleneckOptions", "DeviceMeasurement", "LinkSample", "MeasureOptions", "Progress",
    "TrainedBottleneck", "candidate_cuts", "check_bottleneck", "codec_ids", "default_path", "fit_link", "learned_positions",
    "measure", "payloads", "probe_sizes", "profile_codecs", "profile_device", "profile_key", "train_bottleneck",
    "trainable_cuts",
]  # fmt: skip
