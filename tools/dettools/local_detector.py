"""The worker's own detector in this process: on an archive as it is, or on a spec that is packed first."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from dethandlers.artefact import Artefact, load_artefact
from dethandlers.detector import Detector
from dethandlers.errors import DetectorError
from detserve.archive import build_archive
from detserve.errors import DetserveError
from detserve.mar import unpacked
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
    on_progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Detector]:
    """Load an artefact; a spec is packed into one first, in a temporary folder.

    Args:
        model: a ``.mar``, a ``.yaml`` spec, or the name of an archive in the model store.
        model_store: where names are looked up.
        weights: a checkpoint instead of the spec's.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        threads: of the forward pass; None leaves the archive's.
        on_progress: told what is being done.

    Raises:
        DetserveError: it cannot be built or loaded here.
    """
    where = torch_device(device)
    with ExitStack() as stack:
        archive = Path(model)
        if archive.suffix in _SPECS:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="detserve-")))
            spec = load_spec(archive)
            out = folder / f"{spec.name}.mar"
            archive = build_archive(spec, folder=archive.parent, out=out, weights=weights, on_progress=on_progress).path
        elif weights is not None:
            raise LocalDetectorError(
                f"weights: got {weights} with {str(model)!r}, whose weights are inside. Give a spec."
            )
        else:
            archive = find_archive(model, model_store)
        try:
            artefact = load_artefact(stack.enter_context(unpacked(archive)))
            detector = Detector(_with_threads(artefact, threads), where)
        except DetectorError as error:
            raise LocalDetectorError(f"{archive.name} cannot be loaded here: {error}") from error
        stack.callback(detector.close)
        yield detector


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
