"""An ONNX file that says what it is: spec, category map, golden image and the facts of its export, as its metadata.

The keys are ``detserve.spec``, ``detserve.category_map``, ``detserve.golden`` and ``detserve.export``, each JSON, so
that any reader of ONNX shows them; ``names`` holds the classes in the form that other tools read.
"""

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from dethandlers import __version__
from dethandlers.artefact import Artefact, Golden, category_map_json, golden_json, parse_category_map
from dethandlers.detections import Detections
from dethandlers.errors import ArtefactError
from dethandlers.spec import Spec

from detserve.errors import ArchiveError, ExportError, SpecError
from detserve.export.tracing import EXPORTER
from detserve.spec import parse_spec

SPEC_KEY = "detserve.spec"
CATEGORY_MAP_KEY = "detserve.category_map"
GOLDEN_KEY = "detserve.golden"
EXPORT_KEY = "detserve.export"
NAMES_KEY = "names"
_PLAIN_NAME = re.compile(r"golden(\.(?!json$)[a-z0-9]+)?")


@dataclass(frozen=True)
class ExportFacts:
    """How a file came about.

    Attributes:
        detserve: version.
        torch: version.
        torchvision: version.
        exporter: which of torch's.
        opset: ONNX operator set.
        precision: of the layers.
        nms: ``host`` or ``graph``.
        dynamic: of ``batch`` and ``size``, what is.
        input_range: ``{"batch" | "height" | "width": [least, most or None]}``.
    """

    detserve: str
    torch: str
    torchvision: str
    exporter: str
    opset: int
    precision: str
    nms: str
    dynamic: tuple[str, ...]
    input_range: dict[str, tuple[int, int | None]]

    @classmethod
    def of(
        cls,
        precision: str,
        opset: int,
        dynamic: tuple[str, ...],
        input_range: dict[str, tuple[int, int | None]],
        spec: Spec,
    ) -> "ExportFacts":
        """Return the facts of an export by this detserve and this torch."""
        return cls(
            detserve=__version__,
            torch=torch.__version__,
            torchvision=torchvision.__version__,
            exporter=EXPORTER,
            opset=opset,
            precision=precision,
            nms=spec.decoding.nms,
            dynamic=dynamic,
            input_range=input_range,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class DescribedFile:
    """What a self-describing ONNX file says.

    Attributes:
        spec: of the model, with its category map.
        golden: name of the golden image, and what eager found in it; None where the file holds none.
        facts: of the export, as JSON values.
    """

    spec: Spec
    golden: tuple[str, Golden] | None
    facts: dict[str, Any]


@dataclass(frozen=True)
class Port:
    """An input or output of a file: ``shape`` holds sizes, and names where they are free.

    Attributes:
        name: as the runtime knows it.
        type: element type, such as ``float32``.
        shape: per axis a size or the axis' name.
        default: value that an optional input has; None for the others and for outputs.
    """

    name: str
    type: str
    shape: tuple[int | str, ...]
    default: float | int | None = None


@dataclass(frozen=True)
class FileSignature:
    """A file's inputs and outputs."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def write_described(
    content: bytes,
    spec: Spec,
    facts: ExportFacts,
    golden: tuple[str, Golden],
    defaults: Mapping[str, torch.Tensor],
    output_shapes: Mapping[str, Sequence[int | None]] | None = None,
) -> bytes:
    """Put the description, and the defaults of optional inputs, into an ONNX file.

    The same arguments give the same bytes.

    Args:
        content: the exporter's file.
        spec: of the model.
        facts: of the export.
        golden: name of the golden image, and eager's detections.
        defaults: values of the inputs that may be left out.
        output_shapes: sizes of the outputs' axes that are known; None where one is free.

    Raises:
        ExportError: the exporter's file is not valid ONNX.
    """
    onnx = _onnx()
    model = onnx.load_from_string(content)
    for name, value in defaults.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value.numpy(), name))
    for output in model.graph.output:
        for axis, size in zip(
            output.type.tensor_type.shape.dim, (output_shapes or {}).get(output.name, ()), strict=False
        ):
            if size is not None:
                axis.dim_value = size
    name, shown = golden
    described = {
        SPEC_KEY: spec.to_json(),
        CATEGORY_MAP_KEY: category_map_json(spec.categories),
        GOLDEN_KEY: {**golden_json(shown, name), "image_base64": base64.b64encode(shown.image).decode("ascii")},
        EXPORT_KEY: facts.to_json(),
        NAMES_KEY: {label: category.name for label, category in enumerate(spec.categories)},
    }
    onnx.helper.set_model_props(model, {key: _json(value) for key, value in described.items()})
    model.producer_name, model.producer_version = "detserve", __version__
    model.graph.name = spec.name
    model.graph.doc_string = spec.description
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise ExportError(f"the exported graph is not valid ONNX: {str(error)[:400]}") from error
    written: bytes = model.SerializeToString(deterministic=True)
    return written


def read_described(path: Path) -> DescribedFile | None:
    """Read what an ONNX file says of itself; None when it says nothing.

    Raises:
        ArchiveError: no ONNX file, or a description that cannot be read.
    """
    properties = read_properties(path)
    if SPEC_KEY not in properties or CATEGORY_MAP_KEY not in properties:
        return None
    try:
        categories = parse_category_map(json.loads(properties[CATEGORY_MAP_KEY]))
        # As strict as a spec that somebody wrote: who made the file is not known.
        written = Spec.from_json(json.loads(properties[SPEC_KEY]), categories)
        spec = parse_spec(asdict(written), where=path.name, folder=path.parent)
        golden = _golden(json.loads(properties[GOLDEN_KEY]), len(categories)) if GOLDEN_KEY in properties else None
        facts = dict(json.loads(properties.get(EXPORT_KEY, "{}")))
    except (ArtefactError, SpecError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArchiveError(
            f"{path.name}: its description is damaged or of another version ({error}). Export it again."
        ) from error
    if spec.runtime != "onnx":
        raise ArchiveError(
            f"{path.name}: got runtime {spec.runtime!r} in its description, expected onnx. Export it again."
        )
    return DescribedFile(spec, golden, facts)


def require_described(path: Path) -> DescribedFile:
    """Read what an ONNX file says of itself.

    Raises:
        ArchiveError: no ONNX file, or one that says nothing.
    """
    if not path.is_file():
        raise ArchiveError(f"{path}: is no file. Give the path of an ONNX file.")
    described = read_described(path)
    if described is None:
        raise ArchiveError(
            f"{path.name}: got an ONNX file without a description, expected one that `detserve export` wrote. Describe "
            f"a foreign file by a spec (runtime: onnx) and give the file with --weights {path.name}."
        )
    return described


@contextmanager
def described_artefact(path: Path) -> Iterator[Artefact]:
    """Hold an exported file as an artefact that the worker's detector can load."""
    described = require_described(path)
    yield Artefact(path.parent, described.spec, path, described.golden[1] if described.golden else None)


def read_properties(path: Path) -> dict[str, str]:
    """Return an ONNX file's metadata.

    Raises:
        ArchiveError: it is no ONNX file.
    """
    return {one.key: one.value for one in _load(path).metadata_props}


def read_signature(path: Path) -> FileSignature:
    """Return an ONNX file's inputs and outputs.

    Raises:
        ArchiveError: it is no ONNX file.
    """
    onnx = _onnx()
    graph = _load(path).graph
    values = {one.name: one for one in graph.initializer}

    def port(value: Any) -> Port:
        tensor = value.type.tensor_type
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        axes = tuple(axis.dim_param or axis.dim_value or "?" for axis in tensor.shape.dim)
        default = onnx.numpy_helper.to_array(values[value.name]) if value.name in values else None
        single = default.item() if default is not None and default.size == 1 else None
        return Port(value.name, str(kind), axes, single)

    return FileSignature(tuple(port(one) for one in graph.input), tuple(port(one) for one in graph.output))


def _load(path: Path) -> Any:
    onnx = _onnx()
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's errors share no root
        raise ArchiveError(f"{path.name}: not an ONNX file, or damaged ({error}).") from error
    if not model.graph.node:
        raise ArchiveError(f"{path.name}: not an ONNX file, or an empty one: it holds no operators.")
    outside = [one.name for one in model.graph.initializer if one.data_location == onnx.TensorProto.EXTERNAL]
    if outside:
        raise ArchiveError(
            f"{path.name}: holds {len(outside)} weights in other files, expected all in one, as an archive keeps it. "
            f"Save it as one file: onnx.save(onnx.load({path.name!r}), 'one.onnx')."
        )
    return model


def _golden(value: dict[str, Any], classes: int) -> tuple[str, Golden]:
    found = Detections(
        np.asarray(value["boxes_xyxy"], dtype=np.float32).reshape(-1, 4),
        np.asarray(value["scores"], dtype=np.float32),
        np.asarray(value["labels"], dtype=np.int64),
    )
    if not len(found.boxes_xyxy) == len(found.scores) == len(found.labels):
        raise ValueError("the golden detections are not as many boxes as scores and labels")
    if len(found) and not 0 <= int(found.labels.min()) <= int(found.labels.max()) < classes:
        raise ValueError("the golden detections have labels beyond the category map")
    if not _PLAIN_NAME.fullmatch(str(value["image"])):
        raise ValueError(f"the golden image is called {value['image']!r}")
    image = base64.b64decode(value["image_base64"], validate=True)
    golden = Golden(image, float(value["score_threshold"]), int(value["max_detections"]), found)
    return str(value["image"]), golden


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise ExportError(
            "ONNX files need the package onnx, which is not installed. Install detserve[onnx], or detserve[onnx-gpu]."
        ) from error
    import onnx.checker
    import onnx.helper
    import onnx.numpy_helper

    return onnx
