"""Reading a spec from YAML, strictly: unknown keys, wrong types and duplicate keys are errors that name themselves.

model_store/NAME/NAME.yaml ─► yaml (no duplicate keys) ─► pydantic over dethandlers.spec.Spec ─► Spec
"""

import dataclasses
import difflib
import json
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from dethandlers.detections import Category
from dethandlers.families import FAMILIES
from dethandlers.spec import Serving, Spec
from pydantic import TypeAdapter, ValidationError

from detserve.categories import read_categories
from detserve.errors import SpecError

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-.]*")
VERSION_PATTERN = re.compile(r"[0-9]+(\.[0-9]+)*")
_ADAPTER = TypeAdapter(Spec)


def load_spec(
    path: Path, *, weights: Path | None = None, categories: Path | None = None, allow_code: bool = False
) -> Spec:
    """Read and check a spec.

    ``categories`` may be a list of ``{id, name}`` (``model_label`` optional) or the path of a COCO annotation file
    relative to the spec; a spec of MMDetection's may leave them out, and its checkpoint or config names them.

    Args:
        path: of the spec.
        weights: the checkpoint instead of the spec's, for the classes that it names.
        categories: a COCO annotation file instead of the spec's categories.
        allow_code: a config of MMDetection that is not literal is run for the classes that it names.

    Raises:
        SpecError: no such file, no YAML, an unknown key, a wrong value.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"spec {path}: cannot be read ({error}). Give the path of a spec in YAML.") from error
    try:
        value = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader that also refuses duplicate keys
    except yaml.YAMLError as error:
        raise SpecError(f"spec {path}: not YAML: {error}") from error
    if not isinstance(value, dict):
        raise SpecError(f"spec {path}: got {type(value).__name__}, expected keys such as name, family, categories.")
    if categories is not None:
        value["categories"] = str(categories.resolve())
    return parse_spec(value, where=f"spec {path}", folder=path.parent, weights=weights, allow_code=allow_code)


def parse_spec(
    value: dict[str, Any], *, where: str, folder: Path, weights: Path | None = None, allow_code: bool = False
) -> Spec:
    """Check a spec that is already read.

    Args:
        value: the keys and values.
        where: begins every message.
        folder: what relative paths are relative to.
        weights: as for `load_spec`; relative to the working directory.
        allow_code: as for `load_spec`.

    Raises:
        SpecError: an unknown key or a wrong value.
    """
    filled = dict(value)
    if isinstance(filled.get("categories"), str):
        filled["categories"] = [vars(category) for category in read_categories(folder / filled["categories"])]
    elif "categories" not in filled and filled.get("family") == "mmdet":
        filled["categories"] = _mmdet_categories(filled, where, folder, weights, allow_code=allow_code)
    if "categories" in filled:
        filled["categories"] = complete_categories(filled["categories"], where=where)
    try:
        # Strict, so that "yes" is no bool and 0.5 no int; as JSON, because only there it takes lists for tuples.
        spec = _ADAPTER.validate_json(json.dumps(filled, default=str), strict=True)
    except ValidationError as error:
        raise SpecError(f"{where}: {_first_message(error)}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise SpecError(
            f"{where}: got a value that JSON cannot hold ({error}), expected plain keys and values."
        ) from error
    _check(spec, where)
    return spec


def _mmdet_categories(
    value: dict[str, Any], where: str, folder: Path, weights: Path | None, *, allow_code: bool
) -> list[dict[str, Any]]:
    """The classes that the checkpoint or the config names."""
    from detserve.mmdet_source import mmdet_spec_categories

    for key in ("config",) if weights else ("config", "weights"):
        if not isinstance(value.get(key), str):
            raise SpecError(f"{where}: {key}: missing, so the categories are not known. Add it, or the categories.")
    checkpoint = weights or folder / value["weights"]
    found = mmdet_spec_categories(folder / value["config"], checkpoint, allow_code=allow_code)
    return [vars(one) for one in found]


def override_spec(spec: Spec, changes: dict[str, Any], *, where: str) -> Spec:
    """Return the spec with some keys replaced, checked again; ``builder_options`` and ``serving`` are merged.

    Raises:
        SpecError: an unknown key or a wrong value.
    """
    if not changes:
        return spec
    value = dataclasses.asdict(spec)
    for key, change in changes.items():
        value[key] = {**value[key], **change} if isinstance(change, dict) else change
    return parse_spec(value, where=where, folder=Path())


def dump_spec(spec: Spec, path: Path) -> None:
    """Write a spec as YAML, without what equals the defaults.

    Raises:
        SpecError: it cannot be written there.
    """
    defaults = Spec(name="", family="", categories=())
    value: dict[str, Any] = {}
    for name, item in dataclasses.asdict(spec).items():
        default = dataclasses.asdict(defaults)[name]
        if name == "categories":
            value[name] = [
                {key: entry for key, entry in category.items() if key != "model_label" or entry >= 0}
                for category in item
            ]
        elif isinstance(item, dict) and isinstance(default, dict) and default:
            changed = {key: _plain(entry) for key, entry in item.items() if entry != default[key]}
            if changed:
                value[name] = changed
        elif item != default or name in ("name", "family", "version"):
            value[name] = _plain(item)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), "utf-8")
    except OSError as error:
        raise SpecError(f"spec {path}: cannot be written ({error}).") from error


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def complete_categories(value: Any, *, where: str) -> Any:
    """Fill in the model labels that a spec leaves out; -1 says that the checkpoint decides them."""
    if not isinstance(value, list | tuple) or not value:
        raise SpecError(
            f"{where}: categories: got {str(value)[:60]!r}, expected a list of {{id, name}} or the path of a COCO file."
        )
    return [{"model_label": -1, **item} if isinstance(item, dict) else item for item in value]


def require_name(name: str, version: str, *, where: str) -> None:
    """Refuse a name or a version that a model cannot have; files are called by the name.

    Raises:
        SpecError: it is none.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise SpecError(
            f"{where}: name: got {name!r}, expected letters, digits, '_', '-' and '.' only. Give another with --name."
        )
    if not VERSION_PATTERN.fullmatch(version):
        raise SpecError(
            f"{where}: version: got {version!r}, expected numbers with dots, such as 1.0. Give another with "
            "--model-version."
        )


def _check(spec: Spec, where: str) -> None:
    require_name(spec.name, spec.version, where=where)
    if spec.family == "mmdet" and not spec.config:
        raise SpecError(f"{where}: config: missing, expected the path of MMDetection's config. Add it.")
    if spec.family not in FAMILIES:
        raise SpecError(f"{where}: family: got {spec.family!r}, expected one of {', '.join(sorted(FAMILIES))}.")
    for key in ("id", "name"):
        seen = [getattr(category, key) for category in spec.categories]
        twice = [item for item in seen if seen.count(item) > 1]
        if twice:
            raise SpecError(f"{where}: categories: got {key} {twice[0]!r} twice, expected each once.")
    _check_serving(spec.serving, where)


def _check_serving(serving: Serving, where: str) -> None:
    ranges = {
        "score_threshold": (0, 1),
        "min_score_threshold": (0, 1),
        "max_detections": (1, 1000),
        "batch_size": (0, 1024),
        "max_batch_delay_ms": (1, 60_000),
        "workers": (0, 64),
        "response_timeout_s": (1, 86_400),
        "startup_timeout_s": (1, 86_400),
        "threads": (0, 1024),
        "max_image_pixels": (1, 10**10),
        "min_image_side": (1, 10_000),
        "max_decode_s": (0.001, 3600),
        "max_response_bytes": (10_000, 2 * 10**9),
    }
    for key, (low, high) in ranges.items():
        number = getattr(serving, key)
        if not low <= number <= high:
            raise SpecError(f"{where}: serving.{key}: got {number}, expected {low} to {high}.")
    if serving.score_threshold < serving.min_score_threshold:
        raise SpecError(
            f"{where}: serving.score_threshold: got {serving.score_threshold}, expected at least min_score_threshold "
            f"{serving.min_score_threshold}."
        )


def _first_message(error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    # A misspelt key is also a missing one; the misspelling says more.
    problem = next((one for one in problems if one["type"] == "unexpected_keyword_argument"), problems[0])
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "unexpected_keyword_argument":
        allowed = _keys_at(problem["loc"][:-1])
        close = difflib.get_close_matches(str(problem["loc"][-1]), allowed, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return f"unknown key {place!r}.{hint} Allowed here: {', '.join(allowed)}."
    if problem["type"] in ("missing", "missing_argument"):
        return f"{place}: missing. Add it."
    got = problem.get("input")
    quotes = " Put it in quotes." if problem["type"] == "string_type" and isinstance(got, int | float) else ""
    return f"{place}: got {repr(got)[:60]}, {problem['msg'].lower()}.{quotes}"


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """The keys that the spec knows at a place such as ``("serving",)`` or ``("categories", 0)``."""
    kind: Any = Spec
    for part in location:
        if isinstance(part, int):
            kind = Category
        else:
            hint = typing.get_type_hints(kind).get(part)
            options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            kind = next((option for option in options if dataclasses.is_dataclass(option)), kind)
    return [field.name for field in dataclasses.fields(kind)]


class _StrictLoader(yaml.SafeLoader):
    """YAML without duplicate keys, which plain YAML loaders take silently, the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, refusing a key that stands twice."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"got the key {key!r} twice, expected it once", node.start_mark
                )
        return super().construct_mapping(node, deep)
