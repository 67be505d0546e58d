"""Clients below the level of ours: bytes on a socket, gRPC methods by name, and a load without retries."""

import datetime
import ipaddress
import json
import socket
import ssl
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

PREDICTIONS = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/"
OPEN_INFERENCE = "/org.pytorch.serve.grpc.openinference.GRPCInferenceService/"
MANAGEMENT = "/org.pytorch.serve.grpc.management.ManagementAPIsService/"


def text_field(number: int, value: bytes) -> bytes:
    """Encode one length-delimited field of a protobuf message (values of less than 16 kB)."""
    size = len(value)
    length = bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])
    return bytes([number << 3 | 2]) + length + value


def predictions_request(model: bytes, body: bytes) -> bytes:
    return text_field(1, model) + text_field(3, text_field(1, b"body") + text_field(2, body))


def raw(url: str, request: bytes, *, timeout_s: float = 10.0) -> bytes:
    """Send bytes as they are, return what comes back until the other side closes or is silent."""
    parts = urlsplit(url)
    answer = b""
    with socket.create_connection((parts.hostname, parts.port), timeout=timeout_s) as connection:
        connection.sendall(request)
        connection.settimeout(1.0)
        try:
            while part := connection.recv(65536):
                answer += part
        except TimeoutError:
            pass
    return answer


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/") else 0


def json_of(answer: bytes) -> dict:
    return json.loads(answer.partition(b"\r\n\r\n")[2])


def grpc_call(channel: grpc.Channel, path: str, request: bytes, token: str | None = None, **kind: bool):
    """Call a method by its path; return the bytes or raise grpc.RpcError."""
    metadata = [("authorization", f"Bearer {token}")] if token else []
    if kind.get("stream"):
        return b"".join(channel.unary_stream(path)(request, timeout=20, metadata=metadata))
    return channel.unary_unary(path)(request, timeout=20, metadata=metadata)


def grpc_code(*args, **kind) -> tuple[str, str]:
    """Return the status of a call and its text; ``OK`` when it was answered."""
    try:
        grpc_call(*args, **kind)
    except grpc.RpcError as error:
        return error.code().name, error.details() or ""
    return "OK", ""


@dataclass
class Load:
    """Clients that ask all the time, each with connections kept alive and no retries; a context manager."""

    url: str
    token: str | None
    model: str = "echo"
    clients: int = 4
    body: bytes = b"x"
    statuses: dict[object, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def __enter__(self):
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask) for _ in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        for thread in self._threads:
            thread.join(30)

    def _ask(self):
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        with requests.Session() as session:
            session.trust_env = False
            while not self._ended.is_set():
                try:
                    answer = session.post(
                        f"{self.url}/predictions/{self.model}", data=self.body, headers=headers, timeout=30
                    )
                    outcome, text = answer.status_code, answer.text
                except requests.RequestException as error:
                    outcome, text = type(error).__name__, str(error)
                with self._lock:
                    self.statuses[outcome] = self.statuses.get(outcome, 0) + 1
                    if outcome != 200:
                        self.failures.append(f"{outcome}: {text[:300]}")
                time.sleep(0.005)


def certificate(folder: Path) -> tuple[Path, Path]:
    """Make a certificate for 127.0.0.1 and localhost; return it and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(exist_ok=True)
    paths = folder / "edge.pem", folder / "edge.key"
    paths[0].write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths


def plain_tls(certificate_path: Path, version: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(certificate_path))
    context.minimum_version = context.maximum_version = version
    return context
