"""Joining a cluster by a one-time code, after which the machine is a member and speaks mutual TLS.

The founder's machine runs an Enrolment and shows a code: address, fingerprint of the authority, a secret of 128 bits.
The joiner connects by TLS 1.3 and is shown the authority; only when its fingerprint is the one in the code, and the service
holds a key that this authority named for enrolment, does it send the secret and a signing request. So a machine in the
middle learns nothing, and a stranger without the code gets nothing. A code works once, until it expires. Private keys
never travel.

Messages are 4 bytes of length and JSON, capped; a connection has one deadline in all, so that nobody can hold it open.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import ipaddress
import json
import os
import secrets
import socket
import ssl
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ecotone.trust.identity import (
    ENROLMENT,
    Authority,
    Identity,
    TrustError,
    check_issued_by,
    check_name,
    fingerprint,
    home,
    key_pem,
    request_for,
    save_identity,
)

__all__ = ["Enrolment", "JoinCode", "join"]

PREFIX = "eco1-"
MAX_MESSAGE_BYTES = 16 * 1024
MAX_CONNECTIONS = 8
CONNECTION_S = 10.0
SECRET_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinCode:
    """What a code says: where to go, whom to trust, and the secret that is good for one certificate."""

    host: str
    port: int
    fingerprint: bytes
    secret: bytes

    def text(self) -> str:
        """The code as a person copies it; a check sum catches a wrong letter."""
        body = struct.pack("<H", self.port) + self.fingerprint + self.secret + self.host.encode()
        body += struct.pack("<I", zlib.crc32(body))
        return PREFIX + base64.urlsafe_b64encode(body).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> JoinCode:
        """Read a code; raises TrustError when it is not one."""
        wrong = TrustError("the join code is not complete or was copied wrongly; copy the whole of it again")
        inner = text.strip().removeprefix(PREFIX)
        if not text.strip().startswith(PREFIX) or len(inner) > 512:
            raise wrong
        try:
            body = base64.b64decode(inner + "=" * (-len(inner) % 4), altchars=b"-_", validate=True)
            (port,) = struct.unpack_from("<H", body)
            (checksum,) = struct.unpack_from("<I", body, len(body) - 4)
            host = body[34 + SECRET_BYTES : -4].decode("ascii")
        except (binascii.Error, struct.error, ValueError):
            raise wrong from None
        if len(body) < 39 + SECRET_BYTES or zlib.crc32(body[:-4]) != checksum:
            raise wrong
        return cls(host=host, port=port, fingerprint=body[2:34], secret=body[34 : 34 + SECRET_BYTES])


@dataclass(slots=True)
class _Offer:
    digest: bytes
    expires_s: float
    node: str | None
    used: bool = False


class Enrolment:
    """The service that turns codes into certificates; runs beside the founding node. A context manager.

    `host` is the one address to listen on; `endpoints` are told to each new member as the nodes to connect to.
    """

    def __init__(self, authority: Authority, *, host: str = "127.0.0.1", port: int = 0, endpoints: Iterable[str] = ()):
        self._authority, self._host, self._endpoints = authority, host, tuple(endpoints)
        self._lock = threading.Lock()
        self._offers: list[_Offer] = []
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._context = self._server_context()
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.create_server((host, port), family=family, backlog=MAX_CONNECTIONS)
        except OSError as error:
            raise TrustError(f"{host}:{port}: cannot listen for joining: {error.strerror}; choose another port") from None
        self.port = int(self._listener.getsockname()[1])
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="enrolment", daemon=True)

    def __enter__(self) -> Enrolment:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def code(self, *, ttl_s: float = 600.0, node: str | None = None) -> str:
        """A new code, good once within `ttl_s`; with `node` for that name alone, also one in use (a reinstall)."""
        secret = secrets.token_bytes(SECRET_BYTES)
        offer = _Offer(hashlib.sha256(secret).digest(), time.monotonic() + ttl_s, node)
        with self._lock:
            self._offers.append(offer)
        return JoinCode(host=self._host, port=self.port, fingerprint=self._authority.fingerprint, secret=secret).text()

    def close(self) -> None:
        """Stop answering; codes not used are void."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)

    def _serve(self) -> None:
        while not self._closed.is_set():
            try:
                connection, address = self._listener.accept()
            except OSError:
                if self._closed.is_set():
                    return
                time.sleep(0.05)  # out of file descriptors, for instance: do not spin
                continue
            if not self._slots.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._guarded, args=(connection, address[0]), name="enrolling", daemon=True).start()

    def _guarded(self, connection: socket.socket, address: str) -> None:
        deadline_s = time.monotonic() + CONNECTION_S
        # A socket's own timeout starts anew with every byte: a stranger that drips bytes would hold the place for ever.
        guard = threading.Timer(CONNECTION_S, _hang_up, args=(connection,))
        guard.daemon = True
        guard.start()
        try:
            connection.settimeout(CONNECTION_S)
            with self._context.wrap_socket(connection, server_side=True) as channel:
                self._enrol(channel, address, deadline_s)
        except (OSError, TrustError):
            pass  # a stranger's garbage, or a joiner that went away: it was told what can be told
        finally:
            guard.cancel()
            connection.close()
            self._slots.release()

    def _enrol(self, channel: ssl.SSLSocket, address: str, deadline_s: float) -> None:
        authority = self._authority.certificate.public_bytes(serialization.Encoding.PEM).decode()
        _send(channel, {"authority": authority, "cluster": self._authority.cluster}, deadline_s)
        message = _receive(channel, deadline_s)
        try:
            reply = self._answer(message, address)
        except TrustError as error:
            reply = {"error": str(error)}
        _send(channel, reply, deadline_s)

    def _answer(self, message: dict[str, object], address: str) -> dict[str, object]:
        secret, node, request = (str(message.get(key, "")) for key in ("secret", "node", "request"))
        listed = message.get("addresses", [])
        addresses = [str(text) for text in listed] if isinstance(listed, list) else []
        check_name("node", node)
        if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            addresses.append(address.partition("%")[0])
        with self._lock:
            offer = self._offer(secret)
            if offer.node not in (None, node):
                raise TrustError(f'this code is for node "{offer.node}", not "{node}"; use that name')
            if offer.node is None and node in self._authority.members():
                raise TrustError(f'"{node}" is a member already; choose another name, or ask for a code for this name')
            certificate = self._authority.sign(request.encode(), node, addresses)
            self._authority.add_member(node)
            offer.used = True
        return {"certificate": certificate.decode(), "endpoints": list(self._endpoints)}

    def _offer(self, secret: str) -> _Offer:
        digest = hashlib.sha256(_unhex(secret)).digest()
        found = None
        for offer in self._offers:  # every one is compared, in constant time each
            if hmac.compare_digest(offer.digest, digest):
                found = offer
        if found is None:
            raise TrustError("this join code is not known here; ask for a new one")
        if found.used:
            raise TrustError("this join code was used already; ask for a new one")
        if time.monotonic() > found.expires_s:
            raise TrustError("this join code has expired; ask for a new one")
        return found

    def _server_context(self) -> ssl.SSLContext:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._authority._certify(key.public_key(), ENROLMENT, ())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        with tempfile.TemporaryDirectory() as folder:  # ssl loads from files alone; mode 0700
            path = Path(folder) / "enrolment.pem"
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
                file.write(key_pem(key) + certificate)
            context.load_cert_chain(path)
        return context


def join(
    code: str,
    node: str,
    *,
    directory: Path | None = None,
    addresses: Iterable[str] = (),
    timeout_s: float = 10.0,
) -> Identity:
    """Become a member named `node`: a key is made here, its certificate fetched, both stored; returns the identity.

    `addresses` are the IP addresses by which others will connect to this node. Raises TrustError and leaves no file behind
    for a wrong, used or expired code, another authority than the code names, or no answer within `timeout_s`.
    """
    check_name("node", node)
    parsed = JoinCode.parse(code)
    place, deadline_s = f"{parsed.host}:{parsed.port}", time.monotonic() + timeout_s
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the fingerprint in the code is checked below, before anything is sent
    key = ec.generate_private_key(ec.SECP256R1())
    try:
        with (
            socket.create_connection((parsed.host, parsed.port), timeout=timeout_s) as plain,
            context.wrap_socket(plain) as channel,
        ):
            authority, cluster = _check_service(channel, parsed, place, deadline_s)
            folder = directory or home(cluster)
            if (folder / "node.pem").exists():
                raise TrustError(
                    f'{folder}: this machine is a member of "{cluster}" already; remove the directory to join anew'
                )
            request: dict[str, object] = {
                "secret": parsed.secret.hex(),
                "node": node,
                "request": request_for(node, key).decode(),
                "addresses": list(addresses),
            }
            _send(channel, request, deadline_s)
            reply = _receive(channel, deadline_s)
    except TimeoutError:
        raise TrustError(f"{place}: no answer within {timeout_s:g} s; is the cluster's first node still up?") from None
    except ssl.SSLError as error:
        raise TrustError(
            f"{place}: does not speak TLS as a node does ({error.reason}); is the code's address right?"
        ) from None
    except OSError as error:
        raise TrustError(f"{place}: cannot be reached: {error.strerror or error}; is the cluster's first node up?") from None
    if "error" in reply:
        raise TrustError(f"{place}: {str(reply['error'])[:300]}")
    return _keep(reply, key, node, cluster, authority, folder, place)


def _check_service(channel: ssl.SSLSocket, code: JoinCode, place: str, deadline_s: float) -> tuple[x509.Certificate, str]:
    """The authority and the cluster's name, once the service has proved that it is the one that the code names."""
    hello = _receive(channel, deadline_s)
    presented = channel.getpeercert(binary_form=True)
    try:
        authority = x509.load_pem_x509_certificate(str(hello.get("authority", "")).encode())
        service = x509.load_der_x509_certificate(presented or b"")
        service_name = service.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
        cluster = str(authority.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value)
    except (ValueError, IndexError):
        raise TrustError(f"{place}: what answers there is not an Ecotone node; check the code") from None
    if not hmac.compare_digest(fingerprint(authority), code.fingerprint):
        raise TrustError(
            f"{place}: the authority is not the one in the code; someone else answers there, ask for a new code"
        )
    check_issued_by(service, authority, place)
    if service_name != ENROLMENT:
        raise TrustError(f"{place}: what answers there is a member, not the join service; ask for a new code")
    check_name("cluster", cluster)
    return authority, cluster


def _keep(
    reply: dict[str, object],
    key: ec.EllipticCurvePrivateKey,
    node: str,
    cluster: str,
    authority: x509.Certificate,
    folder: Path,
    place: str,
) -> Identity:
    text = str(reply.get("certificate", "")).encode()
    try:
        certificate = x509.load_pem_x509_certificate(text)
    except ValueError:
        raise TrustError(f"{place}: answered without a certificate; ask for a new code") from None
    check_issued_by(certificate, authority, place)
    if certificate.public_key() != key.public_key():
        raise TrustError(f"{place}: answered with a certificate for another key; ask for a new code")
    listed = reply.get("endpoints", [])
    endpoints = tuple(str(item) for item in listed) if isinstance(listed, list) else ()
    pem = authority.public_bytes(serialization.Encoding.PEM)
    return save_identity(folder, cluster, node, key_pem(key), text, pem, endpoints)


def _send(channel: ssl.SSLSocket, message: dict[str, object], deadline_s: float) -> None:
    body = json.dumps(message).encode()
    channel.settimeout(_left_s(deadline_s))
    channel.sendall(struct.pack("<I", len(body)) + body)


def _receive(channel: ssl.SSLSocket, deadline_s: float) -> dict[str, object]:
    (size,) = struct.unpack("<I", _exactly(channel, 4, deadline_s))
    if size > MAX_MESSAGE_BYTES:
        raise TrustError(
            f"a join message announces {size} bytes, at most {MAX_MESSAGE_BYTES} are taken; check the code's address"
        )
    try:
        message = json.loads(_exactly(channel, size, deadline_s))
    except (ValueError, RecursionError):
        raise TrustError("a join message is not JSON; what answers there is not an Ecotone node") from None
    if not isinstance(message, dict):
        raise TrustError("a join message is not a table; what answers there is not an Ecotone node")
    return message


def _exactly(channel: ssl.SSLSocket, size: int, deadline_s: float) -> bytes:
    found = bytearray()
    while len(found) < size:
        channel.settimeout(_left_s(deadline_s))
        part = channel.recv(size - len(found))
        if not part:
            raise TrustError("the other side ended the joining early; ask for a new code and try again")
        found += part
    return bytes(found)


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _left_s(deadline_s: float) -> float:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s


def _unhex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b""
