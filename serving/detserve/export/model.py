"""Exporting: from a spec and its checkpoint to an ONNX file that says what it is and equals what it was made from.

    spec + checkpoint ─► resolve ─► the family's exporter ─► graph ─┐
    golden image ─► eager on the source checkpoint ─────────────────┤─► one file: graph, spec, category map, golden
                                                                    │   detections ─► the worker's own code must find
                                                                    │   what eager finds, at several sizes ─► NAME.onnx

Nothing is written before everything has been checked.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dethandlers.artefact import Golden, digest_file
from dethandlers.spec import Source, Spec

from detserve.archive import checkpoint_path
from detserve.checkpoint import load_state_dict
from detserve.eager import eager_from_source
from detserve.errors import ExportError
from detserve.export.exporters import EXPORTERS, FREE_AXES, ExportOptions, exporter_of
from detserve.export.onnx_file import ExportFacts, write_described
from detserve.export.rehearsal import Rehearsal, rehearse
from detserve.export.tracing import check_opset
from detserve.golden_image import golden_detections, golden_image_of
from detserve.resolve import resolve_spec


@dataclass(frozen=True)
class ExportedFile:
    """What was exported.

    Attributes:
        path: the ONNX file.
        spec: as inside the file.
        facts: exporter, versions, opset, precision, dynamic axes.
        rehearsal: how far its detections lie from eager's.
        sha256: of the file.
        bytes: its size.
        refused: why it was not written; empty when it was.
        golden_detections: how many eager found on the golden image.
        notes: what a person should know.
    """

    path: Path
    spec: Spec
    facts: ExportFacts
    rehearsal: Rehearsal
    sha256: str
    bytes: int
    golden_detections: int
    notes: tuple[str, ...]
    refused: str = ""


def export_model(
    spec: Spec,
    *,
    folder: Path,
    out: Path,
    weights: Path | None = None,
    golden_image: Path | None = None,
    options: ExportOptions | None = None,
    force: bool = False,
    allow_code: bool = False,
    prove: Callable[[Path], str] | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> ExportedFile:
    """Export a model to an ONNX file.

    Args:
        spec: what to export.
        folder: what the spec's paths are relative to.
        out: the file to write.
        weights: checkpoint instead of the spec's.
        golden_image: image instead of the spec's.
        options: how; None is the defaults.
        force: replace an existing file.
        allow_code: a config of MMDetection that is no literal is run, and what it imports is imported.
        prove: looks at the finished file before it gets its name, and says why it must not; empty when it may.
        on_progress: told what is being done.

    Raises:
        DetserveError: something does not fit, or what the file finds is not what eager finds; no file is left.
    """
    options = options or ExportOptions()
    _check(spec, out, options, force=force)
    checkpoint = checkpoint_path(spec, folder, weights)
    image = golden_image_of(spec, folder, golden_image)
    on_progress(f"reading {checkpoint}")
    resolved, read = _read(spec, folder, checkpoint, allow_code=allow_code)
    on_progress(f"exporting {spec.builder or spec.family} in {options.precision}")
    graph = exporter_of(spec.family)(resolved, read, options)
    packed = replace(
        resolved,
        family=graph.family or spec.family,
        builder=graph.builder or spec.builder,
        runtime="onnx",
        config="",
        modules=(),
        weights="model.onnx",
        golden_image="",
        preprocessing=graph.preprocessing,
        decoding=graph.decoding,
        serving=replace(spec.serving, precision=options.precision),
        source=Source(checkpoint.name, digest_file(checkpoint)),
    )
    on_progress("eager inference on the golden image")
    eager = eager_from_source(spec, checkpoint, folder=folder, allow_code=allow_code)
    name, golden = golden_detections(eager, image, packed.serving)
    facts = ExportFacts.of(options.precision, options.opset, graph.dynamic, graph.input_range, packed)
    content = write_described(graph.content, packed, facts, (name, golden), graph.defaults, graph.output_shapes)
    on_progress("the worker's code finds in the file what eager finds")
    rehearsal = rehearse(content, packed, golden, eager)
    if rehearsal.drift:
        raise ExportError(
            f"not exported: {rehearsal.drift}. The file would answer differently from the {packed.builder} that it "
            "was made from; serve it with runtime: torch"
            + (", or export it with --precision fp32." if options.precision != "fp32" else ".")
        )
    refused = _write(out, content, prove)
    notes = _notes(golden)
    if options.precision != "fp32" and prove is None:
        notes.append(
            f"{options.precision}: its cost in AP was not measured; --verify with --annotations holds it to a budget"
        )
    return ExportedFile(
        path=out,
        spec=packed,
        facts=facts,
        rehearsal=rehearsal,
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        golden_detections=len(golden.detections),
        notes=tuple(notes),
        refused=refused,
    )


def _read(spec: Spec, folder: Path, checkpoint: Path, *, allow_code: bool) -> tuple[Spec, Any]:
    """Return the resolved spec, and the weights as the family's exporter takes them."""
    if spec.family == "mmdet":
        from detserve.mmdet_source import load_source

        model = load_source(spec, folder, checkpoint, allow_code=allow_code)
        return replace(spec, categories=model.categories), model.network
    state = load_state_dict(checkpoint)
    return resolve_spec(spec, state), state


def _check(spec: Spec, out: Path, options: ExportOptions, *, force: bool) -> None:
    if spec.family not in EXPORTERS or spec.runtime != "torch":
        raise ExportError(
            f"family {spec.family!r} with runtime {spec.runtime!r}: there is nothing to export, expected a spec of "
            f"family {' or '.join(EXPORTERS)} with runtime torch. An ONNX file is packed by `detserve archive`."
        )
    if out.suffix != ".onnx":
        raise ExportError(f"out: got {out.name}, expected a name that ends in .onnx. Correct --out.")
    if out.exists() and not force:
        raise ExportError(f"out: {out} exists already. Replace it with --force, or choose another with --out.")
    if not out.parent.is_dir():
        raise ExportError(f"out: got {out}, but there is no folder {out.parent}. Make it, or correct --out.")
    if not os.access(out.parent, os.W_OK):
        raise ExportError(f"out: got {out}, but the folder {out.parent} cannot be written. Correct --out.")
    check_opset(options.opset)
    unknown = [axis for axis in options.dynamic or () if axis not in FREE_AXES]
    if unknown:
        raise ExportError(f"dynamic: got {unknown[0]!r}, expected batch, size, both with a comma, or none.")
    if options.batch < 1:
        raise ExportError(f"batch: got {options.batch}, expected 1 or more. Correct --batch.")


def _notes(golden: Golden) -> list[str]:
    if len(golden.detections):
        return []
    return [
        "eager finds nothing on the golden image, so the comparison sees less: compare on your own images with --verify"
    ]


def _write(out: Path, content: bytes, prove: Callable[[Path], str] | None) -> str:
    """Write the file under its name, unless the proof refuses it."""
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as folder:
        part = Path(folder, out.name)
        try:
            part.write_bytes(content)
        except OSError as error:
            raise ExportError(f"out: {out} cannot be written ({error}).") from error
        refused = prove(part) if prove is not None else ""
        if not refused:
            try:
                part.replace(out)
            except OSError as error:
                raise ExportError(f"out: {out} cannot be written ({error}).") from error
        return refused
