"""The peers' formats and the relay in front of them, by independent readers and by derivation."""

from __future__ import annotations

import socket
import struct
import threading
import time
from pathlib import Path

import pytest

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")

from benchmarks import llm_distributed_llama_file as dllama  # noqa: E402
from benchmarks import llm_gguf, llm_weights  # noqa: E402
from benchmarks.tcp_relay import HOST, Relay  # noqa: E402

from ecotone.llm.config import DecoderConfig, LayerConfig, RopeConfig  # noqa: E402
from ecotone.llm.weights import Checkpoint  # noqa: E402

SMALL = DecoderConfig(
    family="llama", vocabulary=512, width=64, num_heads=4, num_kv_heads=2, head_size=16, ffn_width=96, max_positions=128,
    layers=(LayerConfig(),) * 2, ropes=(RopeConfig(rotary_size=16, original_positions=128),),
)  # fmt: skip
NAMED = dict(llm_weights.tensors(SMALL, 0))


@pytest.mark.torch
def test_rows_for_neighbour_rotation_give_the_same_scores() -> None:
    heads, size, position = 4, 16, 7
    angles = position * 10_000.0 ** (-torch.arange(size // 2) * 2 / size)
    weight, x = torch.randn(heads * size, 64), torch.randn(64)
    halves = (weight @ x).view(heads, 2, size // 2)
    low, high = halves[:, 0], halves[:, 1]
    turned = torch.cat((low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()), 1)
    pairs = torch.view_as_complex((llm_weights.interleaved(weight, heads) @ x).view(heads, size // 2, 2))
    neighbours = torch.view_as_real(pairs * torch.polar(torch.ones(size // 2), angles)).flatten(1)
    assert torch.allclose(neighbours.view(heads, -1, 2).transpose(1, 2).flatten(1), turned, atol=1e-4)


@pytest.mark.torch
def test_gguf_holds_the_model(tmp_path: Path) -> None:
    bits = llm_gguf.write(tmp_path / "m.gguf", SMALL, 0, "4", "8")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert len(found) == len(NAMED)
    down = found["blk.1.ffn_down.weight"]
    assert (down.tensor_type, list(down.shape)) == (gguf.GGMLQuantizationType.Q4_0, [96, 64])
    read = torch.from_numpy(gguf.dequantize(down.data, down.tensor_type))
    wanted = NAMED["layers.1.mlp.down_proj.weight"]
    step = wanted.view(64, 3, 32).abs().amax(-1, keepdim=True) / 8  # Q4_0: 16 steps, the largest value on the last
    assert ((read - wanted).view(64, 3, 32).abs() <= 1.01 * step).all()
    assert torch.equal(torch.from_numpy(found["output_norm.weight"].data.copy()), NAMED["norm.weight"])
    matrices = {name: t for name, t in NAMED.items() if t.dim() == 2 and name != "embed_tokens.weight"}
    head = matrices["lm_head.weight"].numel()
    rest = sum(t.numel() for t in matrices.values()) - head
    assert bits == pytest.approx((4.5 * rest + 8.5 * head) / (rest + head))


@pytest.mark.torch
def test_distributed_llama_file_is_as_long_as_its_header_says(tmp_path: Path) -> None:
    dllama.write_model(tmp_path / "m.m", SMALL, 0, "4")
    content = (tmp_path / "m.m").read_bytes()
    magic, size = struct.unpack_from("<2i", content)
    keys = dict(zip(*[iter(struct.unpack_from(f"<{size // 4 - 2}i", content, 8))] * 2, strict=True))
    assert (magic, keys[2], keys[4], keys[13]) == (0xA00ABCD, 64, 2, 2)
    vectors = sum(t.numel() for t in NAMED.values() if t.dim() == 1)
    matrices = sum(t.numel() for n, t in NAMED.items() if t.dim() == 2 and n != "embed_tokens.weight")
    assert len(content) == size + 4 * (512 * 64 + vectors) + matrices // 32 * 18
    assert content[size : size + 4] == NAMED["embed_tokens.weight"][0, 0].numpy().tobytes()
    dllama.write_tokenizer(tmp_path / "t.t", 512)
    assert len(dllama.chat_message(64, 3)) == 64 - len("[INST] ") - (len(" [/INST]") - 1) - 1


@pytest.mark.torch
def test_the_folder_is_read_as_a_checkpoint(tmp_path: Path) -> None:
    llm_weights.write_folder(tmp_path, SMALL, 0)
    assert Checkpoint.open(tmp_path).config.num_layers == SMALL.num_layers


@pytest.mark.loopback
def test_relay_delays_counts_and_passes_the_end_on() -> None:
    with socket.create_server((HOST, 0)) as server:
        threading.Thread(target=_echo, args=(server,), daemon=True).start()
        relay = Relay(server.getsockname()[1])
        try:
            with socket.create_connection((HOST, relay.port), timeout=20) as client:
                relay.shape(0.02, 1e6)
                begin_s = time.perf_counter()
                client.sendall(bytes(100_000))
                client.shutdown(socket.SHUT_WR)
                assert sum(len(part) for part in iter(lambda: client.recv(65536), b"")) == 100_000
                assert time.perf_counter() - begin_s >= 2 * 0.02 + 0.1  # two delays and, ways overlapping, one transfer
            assert relay.counted() == 200_000
            with socket.create_connection((HOST, relay.port), timeout=20) as client:
                client.sendall(b"x")
                assert client.recv(1) == b"x"
                relay.process.kill()
                assert client.recv(1) == b""
        finally:
            relay.close()


def _echo(server: socket.socket) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection:
            while part := connection.recv(65536):
                connection.sendall(part)
