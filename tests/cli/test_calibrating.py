"""Samples and labels from files, and `profile --labels`, `run --shadow` as a user types them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from commands import Ended
from PIL import Image

from ecotone.cli.calibrating import FileSamples, likely_chains, read_labels
from ecotone.cli.demo_model import ASSETS, frame_paths, frames
from ecotone.cli.resident import Asked, shadowing
from ecotone.cli.workflow import load_work
from ecotone.cluster import DeviceId
from ecotone.model import load_model
from ecotone.plan import Plan, Stage, Transfer
from ecotone.profile import CodecCost, Profile, SegmentTime
from ecotone.profiling import MeasureOptions, profile_key
from ecotone.profiling.codecs import codec_ids
from ecotone.profiling.labels import LabelError
from ecotone.profiling.samples import contents_hash
from ecotone.runtime import deploy, in_memory

NAMES = ("a.png", "b.png", "c.png")


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("l.json", b'{"a.png": 1, "c.png": 0, "b.png": 2, "z.png": 9}', [1, 2, 0]),
        ("l.json", b'{"photos/a.jpg": 1, "b": 2, "c.png": "dog"}', [1, 2, 1]),
        ("l.json", b"[1, 2, 0]", [1, 2, 0]),
        ("l.json", b'{"a.png": [[1, 0]], "b.png": [[1, 1]], "c.png": [[0, 0]]}', [[[1, 0]], [[1, 1]], [[0, 0]]]),
        ("l.csv", b"name,label\na.png,cat\nb.png,1\n\nc.png, dog\n", [0, 1, 1]),
        ("l.csv", b"b.png,1\r\na.png,0\r\nc.png,0\r\n", [0, 1, 0]),
    ],
)
def test_labels_are_brought_into_the_order_of_the_samples(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert read_labels(tmp_path / name, NAMES, ("cat", "dog")) == expected


@pytest.mark.torch
def test_labels_as_arrays(tmp_path):
    array = np.arange(12).reshape(3, 2, 2)
    np.save(tmp_path / "l.npy", array)
    assert np.array_equal(read_labels(tmp_path / "l.npy", NAMES), array)
    safetensors.torch.save_file({"labels": torch.from_numpy(array)}, str(tmp_path / "one.safetensors"))
    assert torch.equal(torch.stack(read_labels(tmp_path / "one.safetensors", NAMES)), torch.from_numpy(array))
    each = {name: torch.from_numpy(array[i]).clone() for i, name in enumerate(NAMES)}
    safetensors.torch.save_file(dict(reversed(each.items())), str(tmp_path / "each.safetensors"))
    assert torch.equal(torch.stack(read_labels(tmp_path / "each.safetensors", NAMES)), torch.from_numpy(array))


@pytest.mark.torch
def test_the_shipped_labels_are_read(tmp_path):
    names = [path.name for path in frame_paths()]
    found = read_labels(ASSETS / "frames" / "labels.json", names)
    assert torch.equal(torch.tensor(found), frames()[1])


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("l.json", b'{"a.png": 1}', ("no label for sample b.png and 1 others", "names a.png")),
        ("l.json", b"{noise", ("cannot be read as json",)),
        ("l.json", b"7", ("hold int", "give a label for each name")),
        ("l.json", b"[1, 2]", ("2 for 3 samples",)),
        ("l.json", b'{"a.png": 1, "b.png": "fish", "c.png": 0}', ("'fish' is neither a class number", "cat, dog")),
        ("l.csv", b"a.png,1\nb.png\n", ("row 2 has 1 columns", "name,label")),
        ("l.csv", b"\xff\xfe", ("cannot be read as csv",)),
        ("l.npy", b"\x93NUMPYnoise", ("cannot be read as npy",)),
        ("l.safetensors", b"noise", ("cannot be read as safetensors",)),
        ("l.txt", b"1", ("suffix .txt is not known", ".json, .csv, .npy, .safetensors are")),
    ],
)
def test_label_files_that_cannot_be_used_say_why(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LabelError) as caught:
        read_labels(tmp_path / name, NAMES, ("cat", "dog"))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    with pytest.raises(LabelError, match="give the path of a file that is there"):
        read_labels(tmp_path / "none.json", NAMES)


def photos(folder: Path, count: int = 24, seed: int = 0) -> list[Path]:
    """Smooth noise as PNG files, 32x32."""
    dice = np.random.default_rng(seed)
    (folder / "photos").mkdir(exist_ok=True)
    found = []
    for number in range(count):
        coarse = dice.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        path = folder / "photos" / f"{number:02d}.png"
        Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(path)
        found.append(path)
    return found


@pytest.mark.torch
def test_samples_are_read_anew_and_named(folder: Path) -> None:
    paths = photos(folder, 5)
    work = load_work("net.py:net", folder / "pair.toml", samples="photos", quiet=True)
    assert isinstance(work.samples, FileSamples)
    assert work.samples.names == tuple(path.name for path in paths)
    assert len(work.samples) == 5
    twice = [[float(sample[0].sum()) for sample in work.samples] for _ in range(2)]
    assert twice[0] == twice[1]
    (folder / "photos" / "words.txt").write_text("one line\nanother\n")  # of unlike kinds: the length is counted
    with pytest.raises(Exception, match="tokenizer"):
        list(load_work("net.py:net", None, samples="photos", quiet=True).samples)


def stated_times(folder: Path) -> None:
    """p.json as if both devices had been measured on the first photos: what is left to measure is accuracy."""
    work = load_work("net.py:net", folder / "pair.toml", samples="photos", quiet=True)
    graph, blocks = work.captured.graph, work.captured.graph.num_blocks
    segments = tuple(
        SegmentTime(
            device=DeviceId(device), executor="torch:fp32", start=a, stop=b, spread_s=0, memory_bytes=0,
            median_s=(b - a) * each,
        )
        for device, each in (("near", 10e-3), ("far", 1e-3))
        for a in range(blocks)
        for b in range(a + 1, blocks + 1)
    )  # fmt: skip
    free = dict.fromkeys(("encode_fixed_s", "encode_s_per_raw_byte", "decode_fixed_s", "decode_s_per_raw_byte"), 0.0)
    codecs = tuple(CodecCost(device=DeviceId(d), codec=name, **free) for d in ("near", "far") for name in codec_ids(()))
    few = [sample for sample, _ in zip(work.samples, range(MeasureOptions().max_samples), strict=False)]
    profile = Profile(
        graph_hash=graph.content_hash(), cluster_name="pair", num_blocks=blocks, cuts=tuple(range(blocks + 1)),
        segments=segments, codecs=codecs, samples_hash=contents_hash(few),
        key=profile_key(graph, work.cluster, samples=few, image=work.preparation.image),
    )  # fmt: skip
    (folder / "p.json").write_text(profile.to_json())


@pytest.mark.loopback
@pytest.mark.timeout(280)
def test_a_labelled_profile_is_shown_planned_with_and_watched(ecotone: Callable[..., Ended], folder: Path) -> None:
    """profile --samples --labels, then plan and run with that file; the shadow finds what was calibrated, then drift."""
    paths = photos(folder)
    loaded = load_model(f"{folder}/net.py:net")
    work = load_work("net.py:net", folder / "pair.toml", samples="photos", quiet=True)
    with torch.no_grad():
        made = {path.name: int(loaded.module(*sample).argmax()) for path, sample in zip(paths, work.samples, strict=True)}
    (folder / "labels.json").write_text(json.dumps(made))
    stated_times(folder)
    pair = ("--cluster", "pair.toml")
    given = ("--samples", "photos", "--labels", "labels.json", "--out", "p.json")
    shown = ecotone("profile", "net.py:net", *pair, *given)
    assert shown.code == 0, shown.err
    for word in ("points lost of 100 % right", "24 samples, 24 decisions", "int4c", "jpeg:90", "crossings of a whole plan"):
        assert word in shown.out, shown.out
    profile = Profile.from_json((folder / "p.json").read_bytes())
    table = profile.accuracy
    assert table is not None
    assert table.is_labelled
    assert table.compositions
    assert all(len(c.crossings) >= 2 for c in table.compositions)
    assert likely_chains(work.captured.graph, work.cluster, profile)[0] == table.compositions[0].crossings
    require = ("--require", "device=far", "--require", "accuracy_loss=0")
    ran = ecotone("run", "net.py:net", "photos", *pair, "--profile", "p.json", *require, "--shadow", "1")
    assert ran.code == 0, ran.err  # no --samples here: those of the file count
    assert Profile.from_json((folder / "p.json").read_bytes()) == profile
    assert "of decisions may differ (calibrated)" in ran.err
    assert "24 of 24 requests compared with the whole model" in ran.err
    assert "drift" not in ran.err


@pytest.mark.torch
def test_drift_is_said_on_standard_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Served in 2 bits, with nothing calibrated: held to what was asked for."""
    photos(folder)
    work = load_work("net.py:net", folder / "pair.toml", samples="photos", quiet=True)
    graph = work.captured.graph
    ends = ("near", "far", "near")
    stages = (Stage(device=DeviceId("far"), start=0, stop=graph.num_blocks),)
    transfers = tuple(
        Transfer(source=DeviceId(s), target=DeviceId(t), position=p, codec=c)
        for s, t, p, c in zip(ends, ends[1:], (0, graph.num_blocks), ("int2", "fp32"), strict=False)
    )
    plan = Plan(graph_hash=graph.content_hash(), stages=stages, transfers=transfers)
    asked = Asked.of("latency", ("accuracy_loss=0.2",), None, "", False, None, 1.0)
    with (
        in_memory(work.cluster) as nodes,
        deploy(plan, work.captured, nodes) as session,
        shadowing(work, session, None, asked) as shadow,
    ):
        assert shadow is not None
        for sample in work.samples:
            session(*sample)
        lines = shadow.summary(60.0)
    said = capsys.readouterr().err
    assert "nothing was calibrated" in said
    assert "at most 0.20% of decisions may differ" in said
    assert "drift: " in said
    assert "24 of 24 requests" in lines[0]
    assert lines[1].startswith("drift: ")


@pytest.mark.torch
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("profile", "net.py:net", "--labels", "l.json"), ("--labels", "give both")),
        (("profile", "net.py:net", "--samples", "photos", "--labels", "l.json"), ("no label for sample 01.png",)),
        (("profile", "net.py:net", "--samples", "photos", "--labels", "none.json"), ("none.json",)),
        (("profile", "net.py:net", "--samples", "photos", "--labels", "high.json"),
         ("label of sample 0 (00.png)", "holds class 5", "classes 0 to 4")),
        (("profile", "net.py:net", "--samples", "photos", "--labels", "maps.json"), ("has shape (2, 2)", "decides (1,)")),
        (("run", "net.py:net", "photos", "--shadow", "2"), ("--shadow 2", "a share of the requests from 0 to 1")),
        (("serve", "net.py:net", "--shadow", "-1"), ("--shadow -1", "for example 0.01")),
    ],
)  # fmt: skip
def test_bad_input_in_one_line(
    ecotone: Callable[..., Ended], folder: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    photos(folder, 2)
    (folder / "l.json").write_text('{"00.png": 1}')
    (folder / "high.json").write_text('{"00.png": 5, "01.png": 1}')
    (folder / "maps.json").write_text('{"00.png": [[1, 2], [0, 1]], "01.png": 1}')
    ended = ecotone(*arguments)
    assert ended.code == 2
    assert all(word in ended.err for word in words), ended.err
    assert "Traceback" not in ended.err
