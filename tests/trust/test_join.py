"""Joining by code: the way it works, and every way it must fail, each with one line and no file left behind."""

from __future__ import annotations

import contextlib
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography import x509

from ecotone.trust import join as joining
from ecotone.trust.identity import ENROLMENT, Authority, Identity, TrustError, home
from ecotone.trust.join import Enrolment, JoinCode, join

pytestmark = pytest.mark.loopback


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create("home", tmp_path / "founder")


def _refused(code: str, folder: Path, message: str, node: str = "camera", timeout_s: float = 10.0) -> None:
    with pytest.raises(TrustError, match=message) as caught:
        join(code, node, directory=folder, timeout_s=timeout_s)
    assert "\n" not in str(caught.value)
    assert not folder.exists() or not list(folder.iterdir())


def test_a_code_makes_a_member_once(authority: Authority, tmp_path: Path) -> None:
    with Enrolment(authority, endpoints=("tls/127.0.0.1:7447",)) as service:
        code = service.code()
        identity = join(code, "camera", directory=tmp_path / "camera", addresses=("192.0.2.7",))
        _refused(code, tmp_path / "second", "used already", node="other")
    loaded = Identity.load("home", tmp_path / "camera")
    assert loaded == identity
    assert (loaded.node, loaded.cluster, loaded.endpoints) == ("camera", "home", ("tls/127.0.0.1:7447",))
    assert stat.S_IMODE(loaded.key.stat().st_mode) == 0o600
    assert authority.members() == ("camera",)
    certificate = x509.load_pem_x509_certificate(loaded.certificate.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "192.0.2.7" in [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    assert "camera" in names.get_values_for_type(x509.DNSName)


def test_a_joined_machine_does_not_join_again_over_its_files(authority: Authority, tmp_path: Path) -> None:
    with Enrolment(authority) as service:
        join(service.code(), "camera", directory=tmp_path / "camera")
        before = (tmp_path / "camera" / "node.pem").read_bytes()
        with pytest.raises(TrustError, match=r"member of .* already"):
            join(service.code(), "camera2", directory=tmp_path / "camera")
    assert (tmp_path / "camera" / "node.pem").read_bytes() == before


def test_names_in_use_need_a_code_of_their_own(authority: Authority, tmp_path: Path) -> None:
    with Enrolment(authority) as service:
        join(service.code(), "camera", directory=tmp_path / "1")
        _refused(service.code(), tmp_path / "2", "member already")
        _refused(service.code(node="camera"), tmp_path / "2", 'for node "camera"', node="other")
        assert join(service.code(node="camera"), "camera", directory=tmp_path / "2").node == "camera"


def test_codes_that_do_not_count(authority: Authority, tmp_path: Path) -> None:
    folder = tmp_path / "camera"
    with Enrolment(authority) as service:
        _refused(service.code(ttl_s=-1.0), folder, "expired")
        code = JoinCode.parse(service.code())
        forged = JoinCode(host=code.host, port=code.port, fingerprint=code.fingerprint, secret=bytes(16))
        _refused(forged.text(), folder, "not known here")
        other = JoinCode(host=code.host, port=code.port, fingerprint=bytes(32), secret=code.secret)
        _refused(other.text(), folder, "not the one in the code")
        assert join(code.text(), "camera", directory=folder).node == "camera", "a failed attempt does not use a code up"
    _refused(code.text(), tmp_path / "late", "cannot be reached")


@pytest.mark.parametrize("text", ["", "eco1-", "hello", "eco1-!!!!", "eco1-" + "A" * 600])
def test_what_is_no_code(text: str, tmp_path: Path) -> None:
    _refused(text, tmp_path / "camera", "copied wrongly")


def test_one_wrong_letter_is_noticed(authority: Authority, tmp_path: Path) -> None:
    with Enrolment(authority) as service:
        code = service.code()
    at = len(code) // 2
    wrong = code[:at] + ("A" if code[at] != "A" else "B") + code[at + 1 :]
    _refused(wrong, tmp_path / "camera", "copied wrongly")


@pytest.mark.parametrize("node", ["", "a/b", "..", ENROLMENT, "x" * 65, "a b"])
def test_names_that_cannot_be(authority: Authority, tmp_path: Path, node: str) -> None:
    with Enrolment(authority) as service:
        _refused(service.code(), tmp_path / "camera", "node name", node=node)


def test_a_member_cannot_play_the_join_service(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = authority.issue("member", directory=tmp_path / "member")
    with Enrolment(authority) as service:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(member.certificate, member.key)
        service._context = context
        _refused(service.code(), tmp_path / "camera", "not the join service")


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00" * 64])
def test_something_else_answers_at_the_address(tmp_path: Path, reply: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        code = JoinCode(host="127.0.0.1", port=server.getsockname()[1], fingerprint=bytes(32), secret=bytes(16))
        _refused(code.text(), tmp_path / "camera", "127.0.0.1")
        thread.join()


def test_silence_ends_in_time(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = JoinCode(host="127.0.0.1", port=server.getsockname()[1], fingerprint=bytes(32), secret=bytes(16))
        _refused(code.text(), tmp_path / "camera", "no answer within", timeout_s=0.5)


def test_garbage_and_idle_strangers_do_not_stop_the_service(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "CONNECTION_S", 1.0)
    with Enrolment(authority) as service:
        place = ("127.0.0.1", service.port)
        with socket.create_connection(place) as stranger:
            stranger.sendall(b"\x16\x03\x01" + b"\xff" * 500)
            stranger.settimeout(10)
            with contextlib.suppress(ConnectionResetError):  # hung up either way: the read ends, and not by its timeout
                while stranger.recv(4096):
                    pass
        idle = [socket.create_connection(place) for _ in range(joining.MAX_CONNECTIONS)]
        for one in idle:  # the service hangs up on every one of them by its deadline
            one.settimeout(20)
            assert one.recv(1) == b""
            one.close()
        assert join(service.code(), "camera", directory=tmp_path / "camera").node == "camera"


def test_identities_are_checked_when_read(authority: Authority, tmp_path: Path) -> None:
    folder = tmp_path / "n"
    with pytest.raises(TrustError, match="no member"):
        Identity.load("home", folder)
    authority.issue("n", directory=folder)
    with pytest.raises(TrustError, match='belongs to cluster "home"'):
        Identity.load("elsewhere", folder)
    key = folder / "node.key"
    key.chmod(0o644)
    with pytest.raises(TrustError, match="chmod 600"):
        Identity.load("home", folder)
    key.chmod(0o600)
    good = key.read_bytes()
    key.write_bytes((authority.issue("o", directory=tmp_path / "o")).key.read_bytes())
    with pytest.raises(TrustError, match="does not belong"):
        Identity.load("home", folder)
    key.write_bytes(good)
    foreign = Authority.create("home", tmp_path / "foreign")
    (folder / "authority.pem").write_bytes((foreign.folder / "authority.pem").read_bytes())
    with pytest.raises(TrustError, match="not signed"):
        Identity.load("home", folder)
    (folder / "authority.pem").write_bytes(b"noise")
    with pytest.raises(TrustError, match="not a certificate"):
        Identity.load("home", folder)


def test_an_authority_is_founded_once_and_only_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECOTONE_HOME", str(tmp_path))
    assert home("home") == tmp_path / "home"
    founded = Authority.create("home")
    assert Authority.load("home").fingerprint == founded.fingerprint
    with pytest.raises(TrustError, match="exists here already"):
        Authority.create("home")
    with pytest.raises(TrustError, match="did not found"):
        Authority.load("away")
    with pytest.raises(TrustError, match="cluster name"):
        home("../x")
