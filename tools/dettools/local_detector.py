"""The worker's own detector in this process: on an archive or exported file as it is, or on a spec, packed first."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from dethandlers.artefact import Artefact, load_artefact
from dethandlers.detector import Detector
from dethandlers.errors import DetectorError
from dethandlers.spec import Spec
from detserve.archive import build_archive
from detserve.errors import DetserveError
from detserve.export.onnx_file import described_artefact
from detserve.mar import unpacked
from detserve.mmdet_source import code_in
from detserve.model_store import find_archive
from detserve.spec import load_spec

_SPECS = (".yaml", ".yml")


class LocalDetectorError(DetserveError):
    """The detector cannot be loaded in this process."""


@contextmanager
def open_detector(
    model: str | Path,
    *,
    model_store: Path,
    weights: Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
    allow_code: bool = False,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Detector]:
    """Load an archive or an exported file; a spec is packed into an archive first, in a temporary folder.

    Args:
        model: a ``.mar``, an exported ``.onnx``, a ``.yaml`` spec, or the name of an archive in the model store.
        model_store: where names are looked up.
        weights: a checkpoint instead of the spec's.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        threads: of the forward pass; None leaves the archive's.
        allow_code: a model of MMDetection may import what its config names.
        on_progress: told what is being done.

    Raises:
        DetserveError: it cannot be built or loaded here.
    """
    where = torch_device(device)
    archive = Path(model)
    if archive.suffix in _SPECS:
        with open_source(
            load_spec(archive, weights=weights, allow_code=allow_code),
            folder=archive.parent,
            weights=weights,
            device=device,
            threads=threads,
            allow_code=allow_code,
            on_progress=on_progress,
        ) as detector:
            yield detector
        return
    if weights is not None:
        raise LocalDetectorError(f"weights: got {weights} with {str(model)!r}, whose weights are inside. Give a spec.")
    if archive.suffix == ".onnx":
        with (
            described_artefact(archive) as artefact,
            _loaded(lambda: artefact, archive.name, where, threads) as detector,
        ):
            yield detector
        return
    archive = find_archive(model, model_store)
    with unpacked(archive) as folder:
        try:
            artefact = load_artefact(folder)
        except DetectorError as error:
            raise LocalDetectorError(f"{archive.name} cannot be loaded here: {error}") from error
        code = [] if allow_code else code_in(artefact)
        if code:
            raise LocalDetectorError(
                f"{archive.name}: its model imports {', '.join(code)}, which would run here. Allow it with "
                "--allow-code if you trust whoever built the archive."
            )
        with _loaded(lambda: artefact, archive.name, where, threads) as detector:
            yield detector


@contextmanager
def open_source(
    spec: Spec,
    *,
    folder: Path,
    weights: Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
    allow_code: bool = False,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Detector]:
    """Pack a spec in a temporary folder, and load what was packed.

    Args:
        spec: of the model.
        folder: what its paths are relative to.
        weights: a checkpoint instead of the spec's.
        device, threads, allow_code, on_progress: as for ``open_detector``.

    Raises:
        DetserveError: it cannot be built or loaded here.
    """
    where = torch_device(device)
    with tempfile.TemporaryDirectory(prefix="detserve-") as place:
        out = Path(place) / f"{spec.name}.mar"
        build_archive(spec, folder=folder, out=out, weights=weights, allow_code=allow_code, on_progress=on_progress)
        with unpacked(out) as files, _loaded(lambda: load_artefact(files), out.name, where, threads) as detector:
            yield detector


@contextmanager
def _loaded(read: Callable[[], Artefact], name: str, device: torch.device, threads: int | None) -> Iterator[Detector]:
    try:
        detector = Detector(_with_threads(read(), threads), device)
    except DetectorError as error:
        raise LocalDetectorError(f"{name} cannot be loaded here: {error}") from error
    try:
        yield detector
    finally:
        detector.close()


def torch_device(name: str) -> torch.device:
    """Return the device of that name.

    Raises:
        LocalDetectorError: there is none of that name, or not on this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise LocalDetectorError(f"device: got {name!r}, expected cpu, cuda or cuda:N. Correct --device.") from error
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < count):
        return device
    raise LocalDetectorError(
        f"device: got {name!r}, but torch sees {count} CUDA devices here. Use --device cpu, or install the driver."
    )


def _with_threads(artefact: Artefact, threads: int | None) -> Artefact:
    if threads is None:
        return artefact
    spec = replace(artefact.spec, serving=replace(artefact.spec.serving, threads=threads))
    return replace(artefact, spec=spec)
