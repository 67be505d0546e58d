"""Reading an ONNX file, or the one inside an archive, with errors that say what is wrong with it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detserve.errors import DetserveError
from detserve.mar import unpacked

# External data beside the graph hold what a protobuf cannot: more than 2 GB.
_EXTERNAL = 1


class OnnxFileError(DetserveError):
    """The file is no ONNX model, is damaged or incomplete, or cannot be read here."""


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX model as it was read.

    Attributes:
        path: where it lies; of an archive the unpacked file.
        subject: names it for people.
        proto: ``onnx.ModelProto``, its functions inlined, without the external data.
        bytes: size of the file and its external data.
    """

    path: Path
    subject: str
    proto: Any
    bytes: int


def import_onnx() -> Any:
    """Import onnx.

    Raises:
        OnnxFileError: it is not installed.
    """
    try:
        import onnx
        import onnx.external_data_helper
        import onnx.inliner
        import onnx.shape_inference
    except ImportError as error:
        raise OnnxFileError(
            "onnx: not installed, expected it to read ONNX files. Install it with: pip install 'detserve[onnx]'"
        ) from error
    return onnx


@contextmanager
def open_onnx(path: Path) -> Iterator[OnnxFile]:
    """Read an ``.onnx`` file, or the one in a ``.mar``, which is unpacked until the block ends.

    Raises:
        OnnxFileError: no such file, no ONNX, damaged, or external data missing.
        ArchiveError: the archive is damaged.
    """
    if path.suffix != ".mar":
        yield read_onnx(path)
        return
    with unpacked(path) as folder:
        files = sorted(folder.rglob("*.onnx"))
        if len(files) != 1:
            raise OnnxFileError(
                f"archive {path.name}: got {len(files)} ONNX files in it, expected one. Give an archive with runtime "
                "onnx, or an .onnx file."
            )
        yield read_onnx(files[0], subject=f"{path.name}: {files[0].name}")


def read_onnx(path: Path, *, subject: str = "") -> OnnxFile:
    """Read an ONNX file; its weights in external files are only looked for.

    Args:
        path: the file.
        subject: names it for people; empty takes the file's name.

    Raises:
        OnnxFileError: no such file, no ONNX, damaged, or external data missing.
    """
    onnx = import_onnx()
    subject = subject or path.name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OnnxFileError(f"{subject}: cannot be read ({error}). Give the path of an .onnx file.") from error
    try:
        proto = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's own class, which differs between its versions
        raise OnnxFileError(
            f"{subject}: got {len(content):,} bytes beginning with {content[:12]!r}, which are no ONNX model or only "
            f"a part of one ({error}). Export or copy the file again."
        ) from error
    if not proto.graph.node or not proto.graph.output or not proto.opset_import:
        raise OnnxFileError(
            f"{subject}: got {len(content):,} bytes without operators, outputs or opset, expected an ONNX model: it is "
            "another kind of file, or was cut off. Export or copy it again."
        )
    size = len(content) + _external_bytes(proto, path.parent, subject)
    _check_whole(proto, subject)
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    return OnnxFile(path, subject, proto, size)


def every_graph(graph: Any) -> Iterator[Any]:
    """Yield a graph and the bodies of its If, Loop and Scan nodes, however deep."""
    yield graph
    for node in graph.node:
        for body in bodies(node):
            yield from every_graph(body)


def numbered_nodes(graph: Any) -> list[Any]:
    """Return all nodes of a graph and its bodies; a node's place here is its number.

    A node's identity does not last: protobuf makes a new object each time that it is looked at.
    """
    return [node for one in every_graph(graph) for node in one.node]


def bodies(node: Any) -> Iterator[Any]:
    """Yield the graphs that a node holds: the branches of an If, the body of a Loop."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _external_bytes(proto: Any, folder: Path, subject: str) -> int:
    files: dict[str, int] = {}
    for graph in every_graph(proto.graph):
        for tensor in graph.initializer:
            if tensor.data_location == _EXTERNAL:
                entries = {entry.key: entry.value for entry in tensor.external_data}
                end = int(entries.get("offset") or 0) + int(entries.get("length") or 0)
                name = entries.get("location", "")
                files[name] = max(files.get(name, 0), end)
    total = 0
    for name, needed in files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise OnnxFileError(
                f"{subject}: its weights are said to lie in {name!r}, outside its folder. Do not use it."
            )
        got = path.stat().st_size if path.is_file() else -1
        if got < needed:
            found = "no such file" if got < 0 else f"{got:,} bytes"
            raise OnnxFileError(
                f"{subject}: its weights lie in {name}: got {found}, expected at least {max(needed, 0):,} bytes beside "
                "the .onnx file. Copy both files together."
            )
        total += got
    return total


def _check_whole(proto: Any, subject: str) -> None:
    """A file cut off between two fields still parses: then nodes read what nothing makes."""
    made = {""}
    for graph in every_graph(proto.graph):
        made |= {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
        made |= {tensor.values.name for tensor in graph.sparse_initializer}
        made |= {name for node in graph.node for name in node.output}
    for graph in every_graph(proto.graph):
        wanted = [name for node in graph.node for name in node.input] + [value.name for value in graph.output]
        lost = [name for name in wanted if name not in made]
        if lost:
            raise OnnxFileError(
                f"{subject}: {lost[0]!r} is read, but neither an input nor a weight nor an operator makes it: the file "
                "is damaged or was cut off. Export or copy it again."
            )
