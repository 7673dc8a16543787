"""Measures devices, codecs and models, and fits links. The verb is `measure`; nodes call `profile_device`."""

from ecotone.profiling.codecs import payloads, profile_codecs
from ecotone.profiling.cuts import candidate_cuts
from ecotone.profiling.device import profile_device
from ecotone.profiling.link import LINK_PROBE_SIZES, LinkSample, fit_link, probe_sizes
from ecotone.profiling.measure import default_path, measure, profile_key
from ecotone.profiling.measurement import DeviceMeasurement, MeasureOptions, Progress

__all__ = [
    "LINK_PROBE_SIZES", "DeviceMeasurement", "LinkSample", "MeasureOptions", "Progress", "candidate_cuts", "default_path",
    "fit_link", "measure", "payloads", "probe_sizes", "profile_codecs", "profile_device", "profile_key",
]  # fmt: skip
