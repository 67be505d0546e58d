"""A config with the places of its values, from a file or out of a `.mar`; nothing is run unless that is allowed."""

import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dethandlers.artefact import SPEC_FILE
from detserve.errors import ArchiveError
from detserve.mar import MANIFEST_FILE, read_json_member
from detserve.mmdet_config import ConfigError, read_config

from dettools.configs.origins import Key, Origins, Place, read_origins, shown_path
from dettools.configs.overrides import overridden

_LARGEST_CONFIG = 16 << 20


@dataclass(frozen=True)
class LocatedConfig:
    """A flattened config.

    Attributes:
        name: of the file, for people.
        values: with the overrides.
        origins: where they are set.
        files: what was read, bases first.
        code_ran: why it had to be run; empty when nothing was.
        notes: what a person should know.
    """

    name: str
    values: dict[str, Any]
    origins: Origins
    files: tuple[str, ...]
    code_ran: str
    notes: tuple[str, ...] = ()


def load_located(path: Path, options: Sequence[str] = (), *, allow_code: bool = False) -> LocatedConfig:
    """Read a config with its bases, or the one in an archive, and set the overrides.

    Raises:
        ConfigError: it cannot be read, would have to be run, or an override leads nowhere.
        ArchiveError: the archive is damaged, or holds no MMDetection config.
    """
    if path.suffix == ".mar":
        with tempfile.TemporaryDirectory(prefix="detserve-") as folder:
            member, text = _packed_config(path)
            file = Path(folder, f"config{Path(member).suffix}")
            file.write_bytes(text)
            found = _located(file, f"{shown_path(path)}/{member}", allow_code=allow_code)
    else:
        found = _located(path, None, allow_code=allow_code)
    changed = overridden(found.values, found.origins, options)
    return replace(found, values=changed.values, origins=changed.origins, notes=(*found.notes, *changed.notes))


def leaves(value: Any, path: tuple[Key, ...] = ()) -> Iterator[tuple[tuple[Key, ...], Any]]:
    """Go through the values that hold no others, with their paths; empty dicts and lists count."""
    if isinstance(value, dict) and value:
        for key in sorted(value, key=str):
            yield from leaves(value[key], (*path, key))
    elif isinstance(value, list | tuple) and any(isinstance(one, dict | list | tuple) for one in value):
        for number, inner in enumerate(value):
            yield from leaves(inner, (*path, number))
    else:
        yield path, value


def _located(path: Path, name: str | None, *, allow_code: bool) -> LocatedConfig:
    config = read_config(path, allow_code=allow_code)
    label = (lambda _: name) if name else shown_path
    shown = name or shown_path(path)
    if config.code_ran:
        note = f"{shown} was run, since it is more than assignments; where its values are set is not known"
        return LocatedConfig(
            shown, config.values, Origins(Place(shown, 0), kind="dict"), (shown,), config.code_ran, (note,)
        )
    origins = read_origins(path, label)
    return LocatedConfig(shown, config.values, origins, tuple(label(file) for file in config.files), "")


def _packed_config(path: Path) -> tuple[str, bytes]:
    """Return the name and the text of the config in an archive of ours, or of MMDetection's script."""
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise ArchiveError(f"archive {path}: cannot be read ({error}).") from error
    if SPEC_FILE in sizes:
        member = str(read_json_member(path, SPEC_FILE).get("config") or "")
    else:
        member = str(dict(read_json_member(path, MANIFEST_FILE).get("model") or {}).get("modelFile") or "")
    if member not in sizes or Path(member).suffix not in (".py", ".json", ".yml", ".yaml"):
        raise ArchiveError(
            f"archive {path.name}: got {member or 'no config'}, expected the config of an MMDetection model in it. "
            "`detserve inspect` shows what an archive holds."
        )
    if sizes[member] > _LARGEST_CONFIG:
        raise ConfigError(f"archive {path.name}: {member} has {sizes[member]} bytes, too many for a config.")
    try:
        with zipfile.ZipFile(path) as archive:
            return member, archive.read(member)
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise ArchiveError(f"archive {path.name}: {member} is damaged ({error}). Build it again.") from error
