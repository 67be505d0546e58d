"""The certificate beside an exported file: what was compared, how far the sides lie apart, and on what machine.

shapes.onnx ─► shapes.certificate.json, or shapes.refused.json when the file was not written
"""

import json
from pathlib import Path

from dethandlers.artefact import digest_file
from detserve.errors import DetserveError
from detserve.export.model import ExportedFile

from dettools.environment import describe_environment
from dettools.verification.parity import Parity


class CertificateError(DetserveError):
    """The certificate cannot be written."""


def certificate_path(file: Path, *, passed: bool) -> Path:
    """Return where the certificate of an exported file lies."""
    return file.with_name(f"{file.stem}.{'certificate' if passed else 'refused'}.json")


def write_certificate(path: Path, exported: ExportedFile, parity: Parity) -> None:
    """Write what was found; one of an earlier export of that name, with the other outcome, is removed.

    Raises:
        CertificateError: it cannot be written there.
    """
    spec = exported.spec
    document = {
        "certificate": 1,
        "passed": parity.passed,
        "file": exported.path.name,
        "sha256": exported.sha256,
        "bytes": exported.bytes,
        "model": {"name": spec.name, "version": spec.version, "family": spec.family, "builder": spec.builder},
        "source": vars(spec.source) if spec.source else None,
        "export": exported.facts.to_json(),
        "parity": parity.to_json(),
        "environment": describe_environment(),
    }
    try:
        path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", "utf-8")
        certificate_path(exported.path, passed=not parity.passed).unlink(missing_ok=True)
    except OSError as error:
        raise CertificateError(f"certificate {path}: cannot be written ({error}).") from error


def certified(file: Path) -> bool | None:
    """Return whether a file is the one that the certificate beside it is about; None when there is none.

    Raises:
        CertificateError: the certificate cannot be read.
    """
    path = certificate_path(file, passed=True)
    if not path.is_file():
        return None
    try:
        return bool(json.loads(path.read_text("utf-8"))["sha256"] == digest_file(file))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CertificateError(f"certificate {path}: cannot be read ({error}). Export the model again.") from error
