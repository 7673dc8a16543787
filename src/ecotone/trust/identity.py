"""Who a node is: a key of its own and a certificate that its cluster's authority signed. Files, checked when read.

The authority is an EC P-256 key on the node that founded the cluster. A node's certificate carries its name (common name),
the cluster (organisation), its addresses (subject alternative names) and both key usages, so that it serves and connects
under mutual TLS. Private keys are made where they are used, stay there, and are readable by their owner alone.
Directory: $ECOTONE_HOME/<cluster>, else ~/.config/ecotone/<cluster>. Not here: who may do what (the wire's access rules).
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ecotone.units import EcotoneError

__all__ = [
    "ENROLMENT", "Authority", "Identity", "TrustError", "check_issued_by", "check_name", "fingerprint", "home", "key_pem",
    "request_for", "save_identity",
]  # fmt: skip

ENROLMENT = "ecotone-enrolment"
"""Common name of the join service; no node can have it."""
AUTHORITY_DAYS, NODE_DAYS = 3650, 730
CLOCK_SLACK = datetime.timedelta(days=1)  # machines without a clock of their own start in the past
MAX_ADDRESSES = 16
_NAME = re.compile(r"^[A-Za-z0-9_.\-]{1,64}$")
_HOST = re.compile(r"^(?!-)[A-Za-z0-9\-]{1,63}(\.[A-Za-z0-9\-]{1,63})*$")


class TrustError(EcotoneError):
    """An identity, certificate or join code cannot be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A member's files: its certificate, its key and the authority's certificate; `endpoints` are members to connect to."""

    cluster: str
    node: str
    certificate: Path
    key: Path
    authority: Path
    endpoints: tuple[str, ...] = ()

    @classmethod
    def load(cls, cluster: str, directory: Path | None = None) -> Identity:
        """Read and check the identity of this machine in `cluster`; raises TrustError with what to do."""
        folder = directory or home(cluster)
        certificate_path, key_path, authority_path = folder / "node.pem", folder / "node.key", folder / "authority.pem"
        if not certificate_path.exists():
            raise TrustError(f'{folder}: this machine is no member of "{cluster}"; join it with ecotone up --join CODE')
        certificate, authority = _read_certificate(certificate_path), _read_certificate(authority_path)
        check_issued_by(certificate, authority, str(certificate_path))
        key = _read_key(key_path)
        if key.public_key() != certificate.public_key():
            raise TrustError(f"{key_path}: the key does not belong to {certificate_path}; remove {folder} and join again")
        owner = _name(certificate, NameOID.ORGANIZATION_NAME)
        if owner != cluster:
            raise TrustError(f'{certificate_path}: belongs to cluster "{owner}", not "{cluster}"; mend the directory')
        return cls(
            cluster=cluster,
            node=_name(certificate, NameOID.COMMON_NAME),
            certificate=certificate_path,
            key=key_path,
            authority=authority_path,
            endpoints=_read_endpoints(folder / "cluster.json"),
        )


def membership(cluster: str, directory: Path | None = None) -> Identity | None:
    """This machine's identity in `cluster`, None where it never joined; raises TrustError for a damaged one."""
    folder = directory or home(cluster)
    return Identity.load(cluster, directory) if (folder / "node.pem").exists() else None


class Authority:
    """The signing side of a cluster; lives on the node that founded it."""

    def __init__(self, cluster: str, folder: Path, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate):
        self.cluster, self.folder = cluster, folder
        self._key, self.certificate = key, certificate

    @classmethod
    def create(cls, cluster: str, directory: Path | None = None) -> Authority:
        """Found `cluster`: make its key and certificate; raises TrustError where one exists already."""
        check_name("cluster", cluster)
        folder = directory or home(cluster)
        if (folder / "authority.pem").exists():
            raise TrustError(f'{folder}: cluster "{cluster}" exists here already; use it, or remove the directory first')
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.COMMON_NAME, f"Ecotone {cluster}"[:64]),
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, cluster),
            ]
        )
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = (
            _builder(name, name, key.public_key(), AUTHORITY_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
            .add_extension(identifier, critical=False)
            .sign(key, hashes.SHA256())
        )
        _write_private(folder / "authority.key", key_pem(key))
        _write_private(folder / "authority.pem", certificate.public_bytes(serialization.Encoding.PEM))
        return cls(cluster, folder, key, certificate)

    @classmethod
    def load(cls, cluster: str, directory: Path | None = None) -> Authority:
        """Read the authority of `cluster`; raises TrustError on machines that did not found it."""
        folder = directory or home(cluster)
        if not (folder / "authority.key").exists():
            raise TrustError(f'{folder}: this machine did not found "{cluster}"; make join codes on the one that did')
        certificate = _read_certificate(folder / "authority.pem")
        key = _read_key(folder / "authority.key")
        if key.public_key() != certificate.public_key():
            raise TrustError(f"{folder}: authority.key does not belong to authority.pem; restore both from one copy")
        return cls(cluster, folder, key, certificate)

    @property
    def fingerprint(self) -> bytes:
        """sha256 of the authority's certificate, 32 bytes."""
        return fingerprint(self.certificate)

    def issue(self, node: str, *, directory: Path | None = None, addresses: Iterable[str] = ()) -> Identity:
        """Make a key and certificate for `node` and write them into `directory` (default: where the authority is)."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self.sign(request_for(node, key), node, addresses)
        authority = self.certificate.public_bytes(serialization.Encoding.PEM)
        return save_identity(directory or self.folder, self.cluster, node, key_pem(key), certificate, authority, ())

    def sign(self, request_pem: bytes, node: str, addresses: Iterable[str] = ()) -> bytes:
        """The PEM certificate for a signing request; only its key is taken from it. Raises TrustError for a bad request."""
        check_name("node", node)
        try:
            request = x509.load_pem_x509_csr(request_pem)
            key = request.public_key()
            sound = request.is_signature_valid
        except (ValueError, TypeError, InvalidSignature) as error:
            raise TrustError(f'node "{node}": its signing request is not readable: {error}') from None
        if not (sound and isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)):
            raise TrustError(f'node "{node}": its signing request must be self-signed with an EC P-256 key')
        return self._certify(key, node, addresses)

    def members(self) -> tuple[str, ...]:
        """Names that were given a certificate, oldest first."""
        try:
            found = json.loads((self.folder / "members.json").read_text())
        except FileNotFoundError:
            return ()
        except (OSError, ValueError) as error:
            raise TrustError(f"{self.folder / 'members.json'}: not readable: {error}; restore or remove it") from None
        return tuple(str(name) for name in found) if isinstance(found, list) else ()

    def add_member(self, node: str) -> None:
        """Note that `node` is a member."""
        names = [name for name in self.members() if name != node] + [node]
        _write_private(self.folder / "members.json", json.dumps(names, indent=1).encode())

    def _certify(self, key: ec.EllipticCurvePublicKey, node: str, addresses: Iterable[str]) -> bytes:
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.COMMON_NAME, node),
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, self.cluster),
            ]
        )
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        own = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        certificate = (
            _builder(subject, self.certificate.subject, key, NODE_DAYS)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True, key_agreement=True), critical=True)
            .add_extension(usage, critical=False)
            .add_extension(x509.SubjectAlternativeName(_alternative_names(node, addresses)), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(own, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)


def home(cluster: str) -> Path:
    """Where this machine keeps what it needs for `cluster`."""
    check_name("cluster", cluster)
    root = os.environ.get("ECOTONE_HOME")
    return (Path(root) if root else Path.home() / ".config" / "ecotone") / cluster


def check_name(what: str, name: str) -> None:
    """Raise TrustError unless `name` may name a node or cluster."""
    if not _NAME.match(name) or name in (".", "..", ENROLMENT):
        raise TrustError(f'{what} name "{name[:80]}": use 1 to 64 letters, digits, "-", "_" or "."')


def fingerprint(certificate: x509.Certificate) -> bytes:
    """sha256 of the certificate, 32 bytes."""
    return certificate.fingerprint(hashes.SHA256())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The private key as unencrypted PKCS #8 PEM."""
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def request_for(node: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    """A PEM signing request for `node`."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def check_issued_by(certificate: x509.Certificate, authority: x509.Certificate, where: str) -> None:
    """Raise TrustError unless `authority` signed `certificate` and both are valid today."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise TrustError(f"{where}: the certificate was not signed by the cluster's authority; join again") from None
    now = datetime.datetime.now(datetime.UTC)
    for one in (certificate, authority):
        if now > one.not_valid_after_utc:
            raise TrustError(f"{where}: the certificate expired on {one.not_valid_after_utc:%Y-%m-%d}; join again")
        if now < one.not_valid_before_utc:
            raise TrustError(
                f"{where}: the certificate is not valid before {one.not_valid_before_utc:%Y-%m-%d}; set the clock"
            )


def save_identity(
    folder: Path, cluster: str, node: str, key: bytes, certificate: bytes, authority: bytes, endpoints: tuple[str, ...]
) -> Identity:
    """Write a member's files, each whole or not at all, the certificate last; returns the identity."""
    paths = Identity(
        cluster=cluster,
        node=node,
        certificate=folder / "node.pem",
        key=folder / "node.key",
        authority=folder / "authority.pem",
        endpoints=endpoints,
    )
    _write_private(paths.key, key)
    _write_private(paths.authority, authority)
    _write_private(folder / "cluster.json", json.dumps({"cluster": cluster, "endpoints": endpoints}, indent=1).encode())
    _write_private(paths.certificate, certificate)
    return paths


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SLACK)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(**granted: bool) -> x509.KeyUsage:
    every = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{name: granted.get(name, False) for name in every})


def _alternative_names(node: str, addresses: Iterable[str]) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = [x509.DNSName("localhost")]
    if _HOST.match(node) and node != "localhost":
        names.append(x509.DNSName(node))
    found = [ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1")]
    for text in list(addresses)[:MAX_ADDRESSES]:
        try:
            found.append(ipaddress.ip_address(text))
        except ValueError:
            raise TrustError(f'node "{node}": "{text[:60]}" is not an IP address') from None
    return names + [x509.IPAddress(address) for address in dict.fromkeys(found)]


def _name(certificate: x509.Certificate, kind: x509.ObjectIdentifier) -> str:
    found = certificate.subject.get_attributes_for_oid(kind)
    return str(found[0].value) if found else ""


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise TrustError(f"{path}: cannot be read: {error.strerror}; join again") from None
    except ValueError:
        raise TrustError(f"{path}: is not a certificate; remove {path.parent} and join again") from None


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        if path.stat().st_mode & 0o077:
            raise TrustError(f"{path}: others can read this private key; run chmod 600 {path}")
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise TrustError(f"{path}: cannot be read: {error.strerror}; join again") from None
    except (ValueError, TypeError):
        raise TrustError(f"{path}: is not a private key; remove {path.parent} and join again") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TrustError(f"{path}: is not an EC key; remove {path.parent} and join again")
    return key


def _read_endpoints(path: Path) -> tuple[str, ...]:
    try:
        found = json.loads(path.read_text())
        return tuple(str(text) for text in found["endpoints"])
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError):
        raise TrustError(f"{path}: is damaged; remove {path.parent} and join again") from None


def _write_private(path: Path, content: bytes) -> None:
    """Write aside with mode 0600, then rename; the directory is the owner's alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp makes it 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise TrustError(f"{path}: cannot be written: {error.strerror}; check the directory's rights") from None
