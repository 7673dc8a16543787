"""Compiles native.cpp for this processor once, tries it in a process whose death is survived, and loads it.

The library is kept under $ECOTONE_CACHE/native by the hash of source, compiler and processor; processes that start together
wait for the one that compiles. A library that crashed or computed wrong in its trial is not loaded; the reason is remembered
in a file beside it until the key changes.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import torch

from ecotone.executors.cache import cache_root, key_of
from ecotone.llm.executors import native_trial
from ecotone.llm.executors.native_packing import BITS_PER_WEIGHT, pack_matrix, unpack_matrix
from ecotone.llm.executors.native_trial import HEAD, Matrix
from ecotone.schema import write_aside

__all__ = ["Layer", "Matrix", "Model", "Norm", "Rope", "StepRecord", "compiler", "library", "library_for", "load_library"]

FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi")
COMPILE_S, TRIAL_S, MAX_ERROR = 120, 60, 0.02
P, I32, F32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float


class Norm(ctypes.Structure):
    _fields_ = [("weight", P), ("bias", P)]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, Matrix) for name in ("qkv", "output", "gate_up", "down", "shared_gate_up", "shared_down")),
        *((name, Norm) for name in ("attention_norm", "attention_post_norm", "ffn_norm", "ffn_post_norm")),
        *((name, P) for name in ("q_norm", "k_norm", "router", "shared_router", "expert_gate_up", "expert_down")),
        *((name, P) for name in ("keys", "values")),
        *((name, I32) for name in ("window", "rope", "sparse")),
    ]  # fmt: skip


class Rope(ctypes.Structure):
    _fields_ = [("frequencies", P), ("scale", F32), ("half", I32)]


class Model(ctypes.Structure):
    _fields_ = [
        ("ropes", P),
        *((name, I32) for name in ("width", "heads", "kv_heads", "head_size", "activation", "gated", "post_norms")),
        *((name, I32) for name in ("parallel", "bf16_cache", "experts", "experts_per_token", "normalise", "threads")),
        *((name, F32) for name in ("epsilon", "scale", "softcap")),
    ]


class StepRecord(ctypes.Structure):
    _fields_ = [("tokens", I32), ("positions", P), ("table_of_token", P), ("tables", P)]


def compiler() -> str:
    """The C++ compiler to use, "" where there is none."""
    names = (os.environ.get("CXX", "c++"), "g++", "clang++")
    return next((found for name in names if (found := shutil.which(name))), "")


def library() -> tuple[ctypes.CDLL | None, str]:
    """The library for this processor and "", or None and why it cannot be used. Compiles (seconds) where it is new."""
    return library_for("native")


@functools.cache
def library_for(processor: str) -> tuple[ctypes.CDLL | None, str]:
    """As `library`, for the compiler's name of a processor: an older one, in tests."""
    path = compiler()
    if not path:
        return None, "no C++ compiler was found; install g++ or clang++"
    source = files("ecotone.llm.executors").joinpath("native.cpp").read_text()
    flags = (*FLAGS, f"-mcpu={processor}" if platform.machine() == "aarch64" else f"-march={processor}")
    known = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    key = key_of("native", source, flags, known, platform.machine(), _cpu_model(), torch.__version__)
    folder = cache_root() / "native"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:  # of several processes that start together one compiles
            fcntl.flock(lock, fcntl.LOCK_EX)
            reason = _made(path, flags, source, folder / f"{key[:32]}.so")
    except subprocess.TimeoutExpired as error:  # not remembered: it says more of the hour than of the machine
        return None, f"compiling or trying it took more than {error.timeout:g} s; try again on a quieter machine"
    except OSError as error:
        return None, f"nothing could be compiled in {folder} ({error.strerror}); set ECOTONE_CACHE to a folder of yours"
    return (None, reason) if reason else (load_library(str(folder / f"{key[:32]}.so")), "")


def _made(path: str, flags: tuple[str, ...], source: str, built: Path) -> str:
    """ "" once the library at `built` is compiled and tried, else why not, as remembered."""
    failed = built.with_suffix(".failed")
    if failed.is_file():
        return failed.read_text()
    reason = ("" if built.is_file() else _build(path, flags, source, built)) or _try(built)
    if reason:
        _remember(failed, reason)
        built.unlink(missing_ok=True)
    return reason


def load_library(path: str) -> ctypes.CDLL:
    """The library at `path` with the types of its functions."""
    made = ctypes.CDLL(path)
    made.ecotone_layers.argtypes = [P, P, I32, P, P]
    made.ecotone_head.argtypes = [P, P, P, I32, P, F32, P]
    made.ecotone_multiply.argtypes = [P, P, I32, P, I32]
    made.ecotone_embed.argtypes = [P, P, I32, F32, P]
    made.ecotone_greedy.argtypes = [P, P, I32, P, F32, P, P, P, P, I32, I32, I32, I32, P]
    for name in ("layers", "head", "multiply", "embed", "greedy"):
        getattr(made, f"ecotone_{name}").restype = None
    return made


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(next((line for line in lines if line.startswith(name)), "") for name in ("model name", "flags"))


def _build(path: str, flags: tuple[str, ...], source: str, built: Path) -> str:
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        code, made = Path(folder) / "native.cpp", Path(folder) / "native.so"
        code.write_text(source)
        command = [path, *flags, str(code), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_S, check=False)
        if done.returncode:
            return f"{Path(path).name} failed: {(done.stderr.strip().splitlines() or ['no message'])[0][:160]}"
        os.replace(made, built)
    return ""


def _try(built: Path) -> str:
    """Multiply with it in another process, which may die (a processor that lacks what its flags promise)."""
    mark = built.with_suffix(".tried")
    if mark.is_file():
        return ""
    generator = torch.Generator().manual_seed(0)
    weight_NK, x_TK = torch.randn(40, 96, generator=generator), torch.randn(5, 96, generator=generator)
    for bits in BITS_PER_WEIGHT:
        packed = pack_matrix(weight_NK, bits)
        content = HEAD.pack(40, 96, 5, bits) + packed.numpy().tobytes() + x_TK.numpy().tobytes()
        command = [sys.executable, native_trial.__file__, str(built)]
        done = subprocess.run(command, input=content, capture_output=True, timeout=TRIAL_S, check=False)
        if done.returncode or len(done.stdout) != 4 * 5 * 40:
            last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
            return f"its trial ended with {done.returncode}: {last[:160]}"
        made_TN = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32).view(5, 40)
        right_TN = x_TK @ unpack_matrix(packed, 40, 96, bits).t()
        error = float((made_TN - right_TN).norm() / right_TN.norm())
        if not error < MAX_ERROR:
            return f"its {bits}-bit product was wrong by {error:.3f} in its trial"
    _remember(mark, "well")
    return ""


def _remember(path: Path, text: str) -> None:
    write_aside(path, text.encode())
