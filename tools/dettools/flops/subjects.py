"""What can be counted: a spec, an MMDetection config, an ONNX file, an archive, or a name in the model store.

Another kind of input is another function and a line in SUBJECTS.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from dethandlers.artefact import load_artefact
from dethandlers.errors import ArtefactError
from dethandlers.families.torchvision_detection import build_module
from dethandlers.mmdet_model import MODULES_FOLDER
from dethandlers.preprocess import shorter_side_size
from dethandlers.spec import Preprocessing, Spec
from detserve.categories import candidate_class_counts
from detserve.checkpoint import load_state_dict
from detserve.errors import SpecError
from detserve.export.onnx_file import SPEC_KEY, read_described
from detserve.mar import unpacked
from detserve.mmdet_config import load_config, read_config
from detserve.mmdet_modules import module_folders
from detserve.model_store import archive_path, find_archive, spec_path
from detserve.resolve import resolve_spec
from detserve.spec import load_spec, override_spec
from torch import nn
from torchvision.models import get_model

from dettools.flops.cost import Cost, FlopsError
from dettools.flops.onnx_count import count_onnx
from dettools.flops.torch_detector import count_detector, input_size, padded_input, size_of_image
from dettools.onnx_graph.inputs import has_open_size
from dettools.onnx_graph.model_file import OnnxFile, read_onnx

Size = tuple[int, int]


@dataclass(frozen=True)
class Asked:
    """What the caller decides.

    Attributes:
        weights: a checkpoint instead of the spec's.
        changes: keys of the spec to replace.
        max_proposals: proposals at most; None takes the model's.
        max_detections: detections at most; None takes the spec's.
        allow_code: a config of MMDetection that is not literal is run, and the modules that it imports are imported.
    """

    weights: Path | None = None
    changes: Mapping[str, Any] | None = None
    max_proposals: int | None = None
    max_detections: int | None = None
    allow_code: bool = False


class Subject(Protocol):
    """A model that can be counted at one size or another."""

    name: str

    def count(self, size: Size | None) -> Cost:
        """Count one forward pass; ``(H, W)`` px of the input, None takes the model's own."""
        ...

    def size_of(self, original: Size) -> Size | None:
        """Return the ``(H, W)`` px that an image of that size has as input; None where it is always the same."""
        ...


@contextmanager
def open_subject(model: str, *, model_store: Path, asked: Asked) -> Iterator[Subject]:
    """Find and build what ``model`` names.

    Args:
        model: a ``.yaml`` spec, an ``.onnx`` file, a ``.mar`` archive, or a name in the model store.
        model_store: where names are looked up.
        asked: what the caller decides.

    Raises:
        DetserveError: there is no such thing, or it cannot be built.
    """
    path = Path(model)
    if path.suffix not in SUBJECTS:
        if path.suffix in (".pth", ".pt", ".safetensors"):
            raise FlopsError(f"model: got {model}, expected one of {_kinds()}. Describe it with a spec.")
        stored = archive_path(model_store, model).is_file()
        path = spec_path(model_store, model) if not stored else find_archive(model, model_store)
        if not path.is_file():
            path = find_archive(model, model_store)
    if not path.is_file() and path.suffix != ".mar":
        raise FlopsError(f"model: got {path}, which is no file, expected one of {_kinds()}. Check the path.")
    with SUBJECTS[path.suffix](path, asked) as subject:
        yield subject


def _kinds() -> str:
    return "a spec (.yaml), an MMDetection config (.py), an .onnx file, a .mar archive, or a name in the model store"


@contextmanager
def _from_spec(path: Path, asked: Asked) -> Iterator[Subject]:
    described = load_spec(path, weights=asked.weights, allow_code=asked.allow_code)
    if described.family == "mmdet" and described.runtime == "torch":
        config = read_config(path.parent / described.config, allow_code=asked.allow_code)
        yield _of_config(config.values, described.name, asked, module_folders(described, path.parent))
        return
    spec = override_spec(described, dict(asked.changes or {}), where="--cfg-options")
    weights = asked.weights or path.parent / (spec.weights or "-")
    if asked.weights is not None and not weights.is_file():
        raise FlopsError(f"weights: got {weights}, which is no file, expected a checkpoint. Correct --weights.")
    yield _of_spec(spec, weights, asked)


@contextmanager
def _from_config(path: Path, asked: Asked) -> Iterator[Subject]:
    if asked.weights is not None:
        raise FlopsError(f"--weights: got {asked.weights} with {path.name}; weights change no cost. Leave it out.")
    yield _of_config(read_config(path, allow_code=asked.allow_code).values, path.stem, asked)


@contextmanager
def _from_onnx(path: Path, asked: Asked) -> Iterator[Subject]:
    _refuse_changes(path, asked)
    file = read_onnx(path)
    described = None
    if any(entry.key == SPEC_KEY for entry in file.proto.metadata_props):
        described = read_described(path)
    yield OnnxSubject(file, asked, described.spec.preprocessing if described else None)


@contextmanager
def _from_archive(path: Path, asked: Asked) -> Iterator[Subject]:
    archive = find_archive(path, path.parent)
    _refuse_changes(archive, asked)
    with unpacked(archive) as folder:
        artefact = load_artefact(folder)
        if artefact.spec.family == "mmdet" and artefact.spec.runtime == "torch":
            config = load_config((folder / artefact.spec.config).read_text("utf-8"))
            yield _of_config(config, artefact.spec.name, asked, [folder / MODULES_FOLDER])
            return
        yield _of_spec(artefact.spec, artefact.weights, asked)


SUBJECTS: dict[str, Callable[[Path, Asked], AbstractContextManager[Subject]]] = {
    ".yaml": _from_spec,
    ".yml": _from_spec,
    ".py": _from_config,
    ".onnx": _from_onnx,
    ".mar": _from_archive,
}


def _refuse_changes(path: Path, asked: Asked) -> None:
    for option, value in (("--weights", asked.weights), ("--cfg-options", asked.changes)):
        if value:
            raise FlopsError(
                f"{option}: got {value} with {path.name}, whose weights and settings are fixed. Give it with a spec."
            )


def _of_config(config: Mapping[str, Any], name: str, asked: Asked, modules: Sequence[Path] = ()) -> Subject:
    # MMDetection's modules are read only where one of its models is counted.
    from dettools.flops.mmdet_detector import MmdetSubject

    return MmdetSubject(
        config,
        name,
        changes=asked.changes,
        max_proposals=asked.max_proposals,
        max_detections=asked.max_detections,
        modules=modules,
        allow_code=asked.allow_code,
    )


def _of_spec(spec: Spec, weights: Path, asked: Asked) -> Subject:
    if spec.runtime == "onnx":
        if not weights.is_file():
            raise FlopsError(
                f"spec {spec.name}: got no file {weights.name}, expected the ONNX file that is to be counted. Give it "
                "with --weights."
            )
        file = read_onnx(weights)
        limits = replace(asked, max_detections=asked.max_detections or spec.serving.max_detections)
        return OnnxSubject(replace(file, subject=f"{spec.name} ({weights.name})"), limits, spec.preprocessing)
    if spec.family != "torchvision":
        raise FlopsError(
            f"spec {spec.name}: got the family {spec.family!r} with runtime torch, expected 'torchvision'. Count its "
            "ONNX file."
        )
    return TorchSubject(spec, weights if weights.is_file() else None, asked)


class TorchSubject:
    """A detector of torchvision; without weights it is built with random ones, which cost the same."""

    def __init__(self, spec: Spec, weights: Path | None, asked: Asked) -> None:
        self.name = f"{spec.name} ({spec.builder})"
        self._asked = asked
        self._max_detections = asked.max_detections or spec.serving.max_detections
        self._types: dict[str, int] | None = None
        self._notes: tuple[str, ...] = ()
        if weights is None:
            self._module, classes = _random_module(spec)
            self._notes = (f"no weights were found: counted with random ones and {classes} classes",)
            return
        state = load_state_dict(weights)
        self._module = build_module(resolve_spec(spec, state), state)
        self._types = {}
        for name, _ in self._module.named_parameters():
            stored = str(state[name].dtype).removeprefix("torch.")
            self._types[stored] = self._types.get(stored, 0) + state[name].numel()

    def count(self, size: Size | None) -> Cost:
        """Count one image."""
        cost = count_detector(
            self._module,
            input_size(self._module, size),
            subject=self.name,
            max_detections=self._max_detections,
            max_proposals=self._asked.max_proposals,
        )
        return replace(cost, notes=cost.notes + self._notes, parameter_types=self._types or cost.parameter_types)

    def size_of(self, original: Size) -> Size | None:
        """Return what the image is resized to."""
        return size_of_image(self._module, original)


class OnnxSubject:
    """An ONNX file.

    Args:
        file: as it was read.
        asked: what the caller decides.
        settings: how its images are prepared; None where nothing says it.
    """

    def __init__(self, file: OnnxFile, asked: Asked, settings: Preprocessing | None) -> None:
        self.name = file.subject
        self._file = file
        self._asked = asked
        self._settings = settings

    def count(self, size: Size | None) -> Cost:
        """Count one batch; a size that the file leaves open is padded as served."""
        settings, padded = self._settings, None
        if settings is not None and has_open_size(self._file):
            if settings.resize == "shorter_side":
                padded = padded_input(size or (settings.shorter_side, settings.longer_side), settings.divisor)
                size = padded.padded
            else:
                size = size or settings.size
        cost = count_onnx(
            self._file, size, max_proposals=self._asked.max_proposals, max_detections=self._asked.max_detections
        )
        return replace(cost, notes=(padded.note, *cost.notes)) if padded and padded.note else cost

    def size_of(self, original: Size) -> Size | None:
        """Return what the image is resized and padded to; None where the file fixes the size.

        Raises:
            FlopsError: nothing says how images are resized.
        """
        if not has_open_size(self._file):
            return None
        settings = self._settings
        if settings is None:
            raise FlopsError(
                f"--images: got them with {self.name}, whose input size is open and which does not say how images are "
                "resized; expected a file of `detserve export`, or a spec. Give --shape HEIGHT WIDTH instead."
            )
        if settings.resize != "shorter_side":
            return settings.size
        resized = shorter_side_size(original, settings.shorter_side, settings.longer_side)
        return padded_input(resized, settings.divisor).padded


def _random_module(spec: Spec) -> tuple[nn.Module, int]:
    counts: Sequence[int] = (spec.num_classes,) if spec.num_classes else candidate_class_counts(spec.categories)
    # Of the focal-loss families there is no background class.
    background = not spec.builder.startswith(("retinanet", "fcos"))
    classes = counts[0] if spec.num_classes or background else len(spec.categories)
    sized = replace(spec, num_classes=classes)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            try:
                state = get_model(
                    spec.builder, weights=None, weights_backbone=None, num_classes=classes, **spec.builder_options
                ).state_dict()
            except (TypeError, ValueError):
                state = {}  # the builder or an option is wrong: build_module says which
            return build_module(sized, state), classes
    except ArtefactError as error:
        raise SpecError(f"spec {spec.name}: {error}") from error
