"""Measures devices, codecs, models and what plans do to answers, fits links, trains bottlenecks. The verb is `measure`;
nodes call `profile_device`."""

from ecotone.profiling.accuracy import measure_accuracy
from ecotone.profiling.bottleneck import (
    BottleneckOptions,
    TrainedBottleneck,
    check_bottleneck,
    train_bottleneck,
    trainable_cuts,
)
from ecotone.profiling.codecs import codec_ids, learned_positions, payloads, profile_codecs
from ecotone.profiling.composition import check_composition, random_crossings
from ecotone.profiling.crossings import ExitRun
from ecotone.profiling.cuts import candidate_cuts
from ecotone.profiling.device import profile_device
from ecotone.profiling.labels import LabelError
from ecotone.profiling.link import LINK_PROBE_SIZES, LinkSample, fit_link, probe_sizes
from ecotone.profiling.measure import default_path, measure, profile_key
from ecotone.profiling.measurement import AccuracyOptions, DeviceMeasurement, MeasureOptions, Progress
from ecotone.profiling.samples import Samples

__all__ = [
    "LINK_PROBE_SIZES", "AccuracyOptions", "BottleneckOptions", "DeviceMeasurement", "ExitRun", "LabelError", "LinkSample",
    "MeasureOptions", "Progress", "Samples", "TrainedBottleneck", "candidate_cuts", "check_bottleneck", "check_composition",
    "codec_ids", "default_path", "fit_link", "learned_positions", "measure", "measure_accuracy", "payloads", "probe_sizes",
    "profile_codecs", "profile_device", "profile_key", "random_crossings", "train_bottleneck", "trainable_cuts",
]  # fmt: skip
