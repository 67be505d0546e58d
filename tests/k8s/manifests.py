"""The manifests as `kubectl kustomize` renders them, and the parts that tests look for."""

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkout import ROOT

K8S = ROOT / "k8s"
ENTRIES = ("overlays/cpu", "overlays/gpu", "overlays/monitored", "overlays/keda", "kserve", "evaluate-job")
"""What a person gives to `kubectl apply -k`."""
COMPONENTS = ("models-from-image", "signed-models", "tls", "keda")
Document = dict[str, Any]


@functools.cache
def _rendered(folder: Path) -> str:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


def render(folder: Path) -> list[Document]:
    """Return the documents of a kustomization."""
    return list(yaml.safe_load_all(_rendered(folder)))


def entry(name: str) -> list[Document]:
    """Return the documents of one of `ENTRIES`."""
    return render(K8S / name)


def with_components(folder: Path, components: Sequence[str], overlay: str = "overlays/cpu") -> list[Document]:
    """Return an overlay with components, from a kustomization written into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    there = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(K8S / overlay, folder)],
        "components": [os.path.relpath(K8S / "components" / name, folder) for name in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(there))
    return render(folder)


def one(documents: Sequence[Document], kind: str, name: str | None = None) -> Document:
    """Return the only document of that kind, or that name."""
    (found,) = [
        document for document in documents if document["kind"] == kind and name in (None, document["metadata"]["name"])
    ]
    return found


def pods(documents: Sequence[Document]) -> Iterator[tuple[str, Document]]:
    """Yield each pod that comes of the documents, as a Pod: its owner's kind and name beside it."""
    for document in documents:
        owner = f"{document['kind']}/{document['metadata']['name']}"
        if document["kind"] in {"Deployment", "Job"}:
            yield owner, {"apiVersion": "v1", "kind": "Pod", **document["spec"]["template"]}
        elif document["kind"] == "InferenceService":
            own = ("minReplicas", "deploymentStrategy")
            spec = {key: value for key, value in document["spec"]["predictor"].items() if key not in own}
            yield owner, {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "predictor"}, "spec": spec}


def flags(arguments: Sequence[str]) -> dict[str, str]:
    """Return ``--name=value`` arguments; a flag alone has the value ''."""
    return {name: value for name, _, value in (argument.partition("=") for argument in arguments) if name[:2] == "--"}
