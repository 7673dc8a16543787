"""Measures devices, codecs, models and what plans do to answers, and fits links. The verb is `measure`; nodes call
`profile_device`."""

from ecotone.profiling.accuracy import measure_accuracy
from ecotone.profiling.codecs import payloads, profile_codecs
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
    "LINK_PROBE_SIZES", "AccuracyOptions", "DeviceMeasurement", "ExitRun", "LabelError", "LinkSample", "MeasureOptions",
    "Progress", "Samples", "candidate_cuts", "check_composition", "default_path", "fit_link", "measure", "measure_accuracy",
    "payloads", "probe_sizes", "profile_codecs", "profile_device", "profile_key", "random_crossings",
]  # fmt: skip
