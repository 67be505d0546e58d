"""What the server needs to know of an archive before it starts: name, version and worker settings."""

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import yaml

from detserve.errors import ServerError

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LARGEST_MEMBER = 1 << 20
_KEYS = {
    "minWorkers": "min_workers",
    "maxWorkers": "max_workers",
    "batchSize": "batch_size",
    "maxBatchDelay": "max_batch_delay_ms",
    "responseTimeout": "response_timeout_s",
    "startupTimeout": "startup_timeout_s",
}


@dataclass(frozen=True)
class ModelSettings:
    """How one model is served; TorchServe's words in `to_torchserve`."""

    min_workers: int = 1
    max_workers: int = 1
    batch_size: int = 1
    max_batch_delay_ms: int = 1
    response_timeout_s: int = 120
    startup_timeout_s: int = 120

    def to_torchserve(self) -> dict[str, int]:
        """Return the entry of TorchServe's configuration. A delay of 0 would mean 100 ms there, so it is 1 at least."""
        entry: dict[str, int] = {key: getattr(self, field) for key, field in _KEYS.items()}
        return {**entry, "maxBatchDelay": max(1, self.max_batch_delay_ms)}

    @classmethod
    def from_torchserve(cls, described: Mapping[str, Any]) -> Self:
        """Return how a version is served, from its description in the management API."""
        return cls(**{field: int(described[key]) for key, field in _KEYS.items()})


@dataclass(frozen=True)
class ArchiveFacts:
    """An archive to be served.

    Attributes:
        open_inference: whether its handler answers the Open Inference Protocol; another's worker dies of ModelInfer.
    """

    path: Path
    name: str
    version: str
    settings: ModelSettings
    open_inference: bool


def read_archive(path: Path, defaults: ModelSettings) -> ArchiveFacts:
    """Read an archive's name, version and worker settings; what it does not set is taken from ``defaults``."""
    if not path.is_file():
        raise ServerError(f"There is no archive {path}. Build it with `detserve archive SPEC.yaml`.")
    try:
        with zipfile.ZipFile(path) as archive:
            manifest = json.loads(_read(archive, "MAR-INF/MANIFEST.json"))
            model = manifest["model"]
            name, version = str(model["modelName"]), str(model["modelVersion"])
            config = model.get("configFile")
            worker = yaml.safe_load(_read(archive, Path(config).name)) if config else {}
            open_inference = "dethandlers/open_inference.py" in archive.NameToInfo
    except zipfile.BadZipFile as error:
        raise ServerError(
            f"{path} is no archive: it is not a zip file ({error}). Build it again with `detserve archive SPEC.yaml`."
        ) from error
    except (KeyError, TypeError, ValueError, OSError, yaml.YAMLError) as error:
        raise ServerError(
            f"{path} is no archive that can be served: {error}. Expected MAR-INF/MANIFEST.json with a model name and "
            "version, and the YAML file that it names. Build it again with `detserve archive SPEC.yaml`."
        ) from error
    for what, word in (("name", name), ("version", version)):
        if not _WORD.fullmatch(word):
            raise ServerError(
                f"{path} has the model {what} {word!r}; expected letters, digits, '.', '_' and '-'. "
                "Change it in the spec and build the archive again."
            )
    return ArchiveFacts(path, name, version, _settings(path, worker or {}, defaults), open_inference)


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    """Read a small member; one that unpacks to more than a manifest ever has is no manifest."""
    with archive.open(name) as file:
        content = file.read(_LARGEST_MEMBER + 1)
    if len(content) > _LARGEST_MEMBER:
        raise ValueError(f"{name} has more than {_LARGEST_MEMBER} bytes")
    return content


def _settings(path: Path, worker: Any, defaults: ModelSettings) -> ModelSettings:
    if not isinstance(worker, dict):
        raise ServerError(f"The worker settings of {path} are {type(worker).__name__}, expected key: value lines.")
    values: dict[str, int] = {}
    for key, field in _KEYS.items():
        value = worker.get(key)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < (0 if key == "maxBatchDelay" else 1):
            raise ServerError(f"{path} sets {key} to {value!r}; expected a whole number of 1 or more.")
        values[field] = value
    settings = replace(defaults, **values)
    if settings.max_workers < settings.min_workers:
        settings = replace(settings, max_workers=settings.min_workers)
    return settings
