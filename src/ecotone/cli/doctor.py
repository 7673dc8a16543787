"""`ecotone doctor`: what is installed here, which executors really work on this machine, and what to do about the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import psutil
import torch
import typer
from rich.markup import escape
from rich.table import Table

from ecotone.cli.console import out, print_json, progress_bar
from ecotone.cluster import Device, DeviceId
from ecotone.executors import IDS, unavailable
from ecotone.executors.cache import cache_root
from ecotone.lab import abilities
from ecotone.llm.executors import native_library
from ecotone.model import capture
from ecotone.profiling import MeasureOptions, profile_device

__all__ = ["doctor"]

State = Literal["ok", "missing", "broken", "note"]
MIN_FREE_BYTES = 2 * 10**9


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report: what was looked at, how it stands, and the remedy where there is one."""

    what: str
    state: State
    detail: str
    remedy: str = ""


EXTRAS = {
    "openvino": ("fast", "fast CPU executors"),
    "onnxruntime": ("fast", "fast CPU executors"),
    "transformers": ("hub", "Hugging Face models and tokenizers"),
    "cv2": ("video", "cameras, video files, RTSP"),
    "matplotlib": ("report", "the PNG of the demo's report"),
}


def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    probe: Annotated[bool, typer.Option(help="Run each executor on a small network, in a process of its own.")] = True,
) -> None:
    """Say what is installed, which executors work on this machine, and what to fix."""
    findings = [*_system(), *_packages(), *_devices(), *_executors(probe, json_output), *_kernels(probe)]
    if json_output:
        print_json([asdict(finding) for finding in findings])
    else:
        _print(findings)
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)


def _system() -> list[Finding]:
    memory = psutil.virtual_memory()
    flags = _processor_flags()
    findings = [
        Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("processor", "ok", f"{os.cpu_count()} cores; {' '.join(flags) or 'no vector features known here'}"),
        Finding("memory", "ok", f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"),
    ]
    root = cache_root()
    existing = next(p for p in (root, *root.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    low = free < MIN_FREE_BYTES
    remedy = "free some space or set ECOTONE_CACHE to a larger disk" if low else ""
    findings.append(Finding("cache", "broken" if low else "ok", f"{root}, {free / 1e9:.1f} GB free", remedy))
    if not os.access(existing, os.W_OK):
        remedy = "set ECOTONE_CACHE to a folder of yours"
        findings.append(Finding("cache", "broken", f"{existing} cannot be written", remedy))
    root_user = hasattr(os, "geteuid") and os.geteuid() == 0
    detail = "yes" if root_user else "no: emulated clusters run in user space"
    found = abilities()
    laboratory = Finding("lab", "ok" if found.has_machines else "note", found.sentence())
    return [*findings, Finding("root", "ok" if root_user else "note", detail), laboratory]


def _processor_flags() -> list[str]:
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "i8mm", "bf16")
    try:
        with open("/proc/cpuinfo") as file:
            words = set(file.read().split())
    except OSError:
        return []
    return [flag for flag in wanted if flag in words]


def _packages() -> list[Finding]:
    findings = []
    for package in ("torch", "eclipse-zenoh", "safetensors", "zstandard", "cryptography"):
        findings.append(Finding(package, "ok", importlib.metadata.version(package)))
    for module, (extra, use) in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            findings.append(Finding(module, "missing", f"needed for {use}", f'pip install "ecotone[{extra}]"'))
        else:
            findings.append(Finding(module, "ok", use))
    return findings


def _devices() -> list[Finding]:
    findings = [Finding("cpu", "ok", f"{torch.get_num_threads()} torch threads by default")]
    for index in range(torch.cuda.device_count()):
        findings.append(Finding(f"cuda:{index}", "ok", torch.cuda.get_device_name(index)))
    if torch.backends.mps.is_available():
        findings.append(Finding("mps", "ok", "Apple GPU"))
    return findings


def _executors(probe: bool, quiet: bool) -> list[Finding]:
    """Each executor run on a small network in a process of its own, so that one that dies is found and survived."""
    missing = unavailable("cpu")
    findings = [
        Finding(name, "missing", reason.partition(";")[0], reason.partition(";")[2].strip())
        for name, reason in missing.items()
    ]
    present = tuple(name for name in IDS if name not in missing)
    if not probe:
        return findings + [Finding(name, "ok", "installed, not tried") for name in present]
    network = _small_network()  # seeds torch
    captured = capture(network, (torch.rand(1, 3, 32, 32),), name="probe")
    device = Device(name=DeviceId("here"), memory_bytes=psutil.virtual_memory().total)
    options = MeasureOptions(executors=present, codecs=("fp32",), max_error=1e9, rounds=1, screening_rounds=1, keep=1)
    with progress_bar("trying executors", quiet=quiet or not sys.stderr.isatty()) as report:
        cuts = (0, captured.graph.num_blocks)
        measured = profile_device(captured, device, cuts=cuts, options=options, progress=report)
    errors = {s.executor: s.relative_error for s in measured.segments}
    findings += [Finding(n, "ok", f"works, error {errors[n]:.0e} against eager float32") for n in present if n in errors]
    remedy = "it is passed over; nothing else to do"
    return findings + [
        Finding(f.executor, "broken", f.reason, remedy) for f in measured.failures if f.executor not in missing
    ]


def _kernels(probe: bool) -> list[Finding]:
    """The kernels for language models, which are compiled where they run."""
    name, path = "native kernels", native_library.compiler()
    if not path:
        detail = "language models decode several times faster on a CPU by kernels that a C++ compiler makes"
        return [Finding(name, "missing", detail, "install g++ or clang++")]
    if not probe:
        return [Finding(name, "ok", f"for language models: {path} is there, not tried")]
    reason = native_library.library()[1]
    remedy = "language models run by torch or OpenVINO here; nothing else to do"
    if reason:
        return [Finding(name, "broken", reason, remedy)]
    return [Finding(name, "ok", f"for language models: compiled by {path}, tried")]


def _small_network() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(3, 16, 3, stride=2), torch.nn.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.Conv2d(16, 8, 3))
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 4)).eval()


def _print(findings: list[Finding]) -> None:
    marks = {"ok": "[green]ok[/]", "missing": "[yellow]missing[/]", "broken": "[red]broken[/]", "note": "[blue]note[/]"}
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        remedy = f"\n[dim]-> {escape(finding.remedy)}[/]" if finding.remedy else ""
        table.add_row(finding.what, marks[finding.state], escape(finding.detail) + remedy)
    out.print(table)
    broken = [finding.what for finding in findings if finding.state == "broken"]
    out.print(f"[red]to fix: {', '.join(broken)}[/]" if broken else "[green]nothing to fix[/]")
