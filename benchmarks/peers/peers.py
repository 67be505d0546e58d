"""The servers of the table: how each is started, what is sent to it, how its answer is read, and its settings.

Each serves the same weights with torchvision's own model, as the server's documentation shows: its defaults, and its
dynamic batching (8 images, 5 ms) where it has one. And each a second time with the threads and workers that suit a few
cores: a table of crippled peers would prove nothing. How ours is started stands in `servers.py`.
"""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from detserve.async_client import Target, read_list
from detserve.errors import ClientError

HERE = Path(__file__).resolve().parent
DEMO = HERE / "demo"
CLASS_NAMES = ("circle", "square", "triangle", "star", "ring", "cross")
_BOUNDARY = "detserve-peers-boundary"


@dataclass(frozen=True)
class Workplace:
    """What a peer needs to be started.

    Attributes:
        python: of its environment.
        folder: its own, for its files and its log.
        weights: the state dict, by torch.save.
        port: free on 127.0.0.1.
    """

    python: Path
    folder: Path
    weights: Path
    port: int


@dataclass(frozen=True)
class Launch:
    """A command to run."""

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Peer:
    """One foreign server.

    Attributes:
        name: on the command line and in the figures.
        folder: of its requirements here, and of its environment.
        title: in the table; ``{version}`` is that of ``package``.
        settings: workers, batching and threads, and which of them are its defaults.
        launch: prepares the workplace and returns the command.
        target: from the base address.
        score_threshold: below this it answers nothing.
    """

    name: str
    folder: str
    title: str
    package: str
    settings: str
    launch: Callable[[Workplace], Launch]
    target: Callable[[str], Target]
    score_threshold: float = 0.05


def form(name: str) -> dict[str, Any]:
    """Return a target's ``encode`` and ``content_type`` for an image as a form's file of that name."""
    head = (
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="image.jpg"\r\n'
        "Content-Type: image/jpeg\r\n\r\n"
    ).encode()
    tail = f"\r\n--{_BOUNDARY}--\r\n".encode()

    def encode(image: bytes) -> bytes:
        return b"".join((head, image, tail))

    return {"encode": encode, "content_type": f"multipart/form-data; boundary={_BOUNDARY}"}


def read_object_detector(body: bytes) -> list[dict[str, Any]]:
    """Read the answer of TorchServe's object_detector: the class name is a key of its own beside ``score``.

    Raises:
        ClientError: it is no such answer.
    """
    try:
        found = []
        for one in json.loads(body):
            (name,) = one.keys() - {"score"}
            found.append({"class_label": CLASS_NAMES.index(name), "bbox": one[name], "score": one["score"]})
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ClientError(f"Expected the answer of object_detector, got {body[:100]!r}.") from error
    return found


def read_first(body: bytes) -> list[dict[str, Any]]:
    """Read the answer to a list of one image.

    Raises:
        ClientError: it is no such answer.
    """
    try:
        (found,) = json.loads(body)
    except (ValueError, TypeError) as error:
        raise ClientError(f"Expected a list of one list of detections, got {body[:100]!r}.") from error
    return read_list(json.dumps(found).encode())


def _torchserve(place: Workplace) -> Launch:
    """Archive by torch-model-archiver, as the object detection example of TorchServe does."""
    from detserve.server import find_java, free_ports

    store = place.folder / "store"
    store.mkdir(exist_ok=True)
    names = place.folder / "index_to_name.json"
    names.write_text(json.dumps({str(number): name for number, name in enumerate(CLASS_NAMES, 1)}), "utf-8")
    archiver = [str(place.python.parent / "torch-model-archiver"), "--model-name", "shapes", "--version", "1.0"]
    archiver += ["--model-file", str(DEMO / "model.py"), "--serialized-file", str(place.weights)]
    archiver += ["--handler", "object_detector", "--extra-files", str(names), "--export-path", str(store), "--force"]
    subprocess.run(archiver, check=True, capture_output=True, timeout=120)
    ports = free_ports()
    (place.folder / "config.properties").write_text(
        f"inference_address=http://127.0.0.1:{place.port}\nmanagement_address=http://127.0.0.1:{ports.management}\n"
        f"metrics_address=http://127.0.0.1:{ports.metrics}\ngrpc_inference_address=127.0.0.1\n"
        f"grpc_management_address=127.0.0.1\ngrpc_inference_port={ports.grpc_inference}\n"
        f"grpc_management_port={ports.grpc_management}\n",
        "utf-8",
    )
    command = [str(place.python), "-m", "ts.model_server", "--start", "--foreground", "--ncs", "--disable-token-auth"]
    command += ["--ts-config", "config.properties", "--model-store", "store", "--models", "shapes=shapes.mar"]
    return Launch(command, {"JAVA_HOME": str(find_java().path.parent.parent)})


def _litserve(place: Workplace) -> Launch:
    return Launch([str(place.python), str(HERE / "litserve" / "server.py"), str(place.port)])


def _mosec(place: Workplace) -> Launch:
    server = str(HERE / "mosec" / "server.py")
    # Its default of 3 s is shorter than a queue of 16 images on two slow cores.
    command = [str(place.python), server, "--address", "127.0.0.1", "--port", str(place.port), "--timeout", "60000"]
    return Launch(command)


def _bentoml(place: Workplace) -> Launch:
    command = [str(place.python), "-m", "bentoml", "serve", "service:Detector", "--host", "127.0.0.1"]
    command += ["--port", str(place.port), "--working-dir", str(HERE / "bentoml")]
    return Launch(command, {"BENTOML_HOME": str(place.folder / "home"), "BENTOML_DO_NOT_TRACK": "True"})


DEFAULTS = (
    Peer(
        "torchserve",
        "torchserve",
        "TorchServe {version}, object_detector",
        "torchserve",
        "all defaults: a worker per core, batch size 1, torch's threads; the handler drops scores below 0.5",
        _torchserve,
        lambda url: Target(url, "/predictions/shapes", content_type="image/jpeg", read=read_object_detector),
        score_threshold=0.5,
    ),
    Peer(
        "litserve",
        "litserve",
        "LitServe {version}",
        "litserve",
        "max_batch_size=8, batch_timeout=0.005; one worker and torch's threads by default; form upload",
        _litserve,
        lambda url: Target(url, "/predict", **form("image")),
    ),
    Peer(
        "mosec",
        "mosec",
        "mosec {version}",
        "mosec",
        "two to decode, one for inference with max_batch_size=8, max_wait_time=5; --timeout 60000; torch threads",
        _mosec,
        lambda url: Target(url, "/inference", content_type="image/jpeg"),
    ),
    Peer(
        "bentoml",
        "bentoml",
        "BentoML {version}",
        "bentoml",
        "batchable, max_batch_size=8; one worker and torch's threads by default; form upload",
        _bentoml,
        lambda url: Target(url, "/detect", read=read_first, **form("images")),
    ),
)


def _per_core(peer: Peer) -> Peer:
    """The same server with one torch thread a worker and a worker per core.

    Left alone, torch takes a thread per core in every process. When those share the cores with the client, or with a
    second worker, each of a network's hundred parallel sections waits for the thread that has no core just now.
    """

    def launch(place: Workplace) -> Launch:
        plain = peer.launch(place)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return Launch(plain.command, {**plain.environment, "PEERS_WORKERS": str(cores), "OMP_NUM_THREADS": "1"})

    return replace(
        peer,
        name=f"{peer.name}-tuned",
        title=f"{peer.title}, tuned",
        settings="as above, but an inference process per core, with one torch thread each (OMP_NUM_THREADS=1)",
        launch=launch,
    )


PEERS = tuple(variant for peer in DEFAULTS for variant in (peer, _per_core(peer)))
