"""What an unpacked archive holds, read and checked: spec, category map, weights, golden image, digests.

spec.json  category_map.json  weights.safetensors | model.onnx  golden/  SHA256SUMS  entry.py  dethandlers/
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dethandlers.detections import Category, Detections
from dethandlers.errors import ArtefactError
from dethandlers.spec import Spec

SPEC_FILE = "spec.json"
CATEGORY_MAP_FILE = "category_map.json"
DIGESTS_FILE = "SHA256SUMS"
GOLDEN_FILE = "golden/golden.json"


@dataclass(frozen=True)
class Golden:
    """The golden image and what eager inference on the source checkpoint found in it.

    Attributes:
        image: the encoded image.
        score_threshold: of the detections.
        max_detections: of the detections.
        detections: eager's.
    """

    image: bytes
    score_threshold: float
    max_detections: int
    detections: Detections


@dataclass(frozen=True)
class Artefact:
    """An unpacked archive.

    Attributes:
        folder: where it lies.
        spec: what it is, with the category map.
        weights: the file that the runtime loads.
        golden: the golden image, or None when the archive was built without one.
    """

    folder: Path
    spec: Spec
    weights: Path
    golden: Golden | None


def load_artefact(folder: Path, *, check_digests: bool = True) -> Artefact:
    """Read an unpacked archive.

    Raises:
        ArtefactError: a member is missing, damaged or not what its digest says.
    """
    if check_digests:
        verify_digests(folder)
    categories = parse_category_map(_read_json(folder / CATEGORY_MAP_FILE))
    try:
        spec = Spec.from_json(_read_json(folder / SPEC_FILE), categories)
    except (TypeError, KeyError) as error:
        raise ArtefactError(
            f"{SPEC_FILE}: got a spec that this code does not read ({error}). Rebuild the archive."
        ) from error
    weights = folder / spec.weights
    if not weights.is_file():
        raise ArtefactError(f"{spec.weights}: the weights are missing from the archive. Rebuild it.")
    return Artefact(folder, spec, weights, _load_golden(folder))


def parse_category_map(value: Any) -> tuple[Category, ...]:
    """Read ``category_map.json``: a list of ``{label, category_id, name, model_label}``, in label order."""
    try:
        rows = sorted(value, key=lambda row: row["label"])
        categories = tuple(
            Category(id=int(row["category_id"]), name=str(row["name"]), model_label=int(row["model_label"]))
            for row in rows
        )
    except (TypeError, KeyError, ValueError) as error:
        raise ArtefactError(f"{CATEGORY_MAP_FILE}: not a category map ({error}). Rebuild the archive.") from error
    if [row["label"] for row in rows] != list(range(len(rows))) or not rows:
        raise ArtefactError(f"{CATEGORY_MAP_FILE}: labels are not 0, 1, 2, … Rebuild the archive.")
    return categories


def category_map_json(categories: tuple[Category, ...]) -> list[dict[str, Any]]:
    """Return what ``parse_category_map`` reads."""
    return [
        {"label": label, "category_id": category.id, "name": category.name, "model_label": category.model_label}
        for label, category in enumerate(categories)
    ]


def golden_json(golden: Golden, image_name: str) -> dict[str, Any]:
    """Return what the archive keeps of a golden image beside the image; boxes to 0.001 px, scores to 1e-5."""
    found = golden.detections
    return {
        "image": image_name,
        "score_threshold": golden.score_threshold,
        "max_detections": golden.max_detections,
        "boxes_xyxy": [[round(value, 3) for value in box] for box in found.boxes_xyxy.tolist()],
        "scores": [round(value, 5) for value in found.scores.tolist()],
        "labels": found.labels.tolist(),
    }


def verify_digests(folder: Path) -> None:
    """Compare every member that ``SHA256SUMS`` lists with its digest.

    Raises:
        ArtefactError: names the first member that is missing or differs.
    """
    for name, expected in read_digests(folder / DIGESTS_FILE).items():
        member = folder / name
        if not member.is_file():
            raise ArtefactError(f"{name}: listed in {DIGESTS_FILE}, but missing. Copy or build the archive again.")
        got = digest_file(member)
        if got != expected:
            raise ArtefactError(
                f"{name}: got SHA-256 {got[:16]}…, expected {expected[:16]}…. The archive was changed after it was "
                "built: copy or build it again."
            )


def read_digests(path: Path) -> dict[str, str]:
    """Read ``SHA256SUMS`` (the form of sha256sum): member name to hex digest."""
    if not path.is_file():
        raise ArtefactError(f"{DIGESTS_FILE}: missing. This is not an archive of detserve, or it was changed.")
    digests: dict[str, str] = {}
    for line in path.read_text("utf-8").splitlines():
        digest, separator, name = line.partition("  ")
        if not separator or len(digest) != 64:
            raise ArtefactError(f"{DIGESTS_FILE}: got the line {line[:60]!r}, expected '<sha256>  <member>'.")
        digests[name] = digest
    return digests


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load_golden(folder: Path) -> Golden | None:
    path = folder / GOLDEN_FILE
    if not path.is_file():
        return None
    value = _read_json(path)
    try:
        detections = Detections(
            np.asarray(value["boxes_xyxy"], dtype=np.float32).reshape(-1, 4),
            np.asarray(value["scores"], dtype=np.float32),
            np.asarray(value["labels"], dtype=np.int64),
        )
        image = (path.parent / Path(value["image"]).name).read_bytes()
        return Golden(image, float(value["score_threshold"]), int(value["max_detections"]), detections)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ArtefactError(f"{GOLDEN_FILE}: damaged ({error}). Rebuild the archive.") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ArtefactError(f"{path.name}: missing from the archive. Rebuild it.") from error
    except ValueError as error:
        raise ArtefactError(f"{path.name}: not JSON ({error}). Rebuild the archive.") from error
