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
    """Write what was found. A pass removes the refusal of an earlier export of that name; a refusal removes nothing.

    The file that a refused one would have replaced is still there, and its certificate is still about it.

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
        if parity.passed:
            certificate_path(exported.path, passed=False).unlink(missing_ok=True)
    except OSError as error:
        raise CertificateError(f"certificate {path}: cannot be written ({error}).") from error


def remove_stale_certificate(file: Path) -> bool:
    """Remove the certificate beside a file that was written without a proof, unless it is about that very file.

    Returns:
        Whether one was removed.

    Raises:
        CertificateError: it cannot be removed.
    """
    try:
        stale = certified(file) is False
    except CertificateError:
        stale = True
    if stale:
        path = certificate_path(file, passed=True)
        try:
            path.unlink()
        except OSError as error:
            raise CertificateError(f"certificate {path}: cannot be removed ({error}).") from error
    return stale


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
