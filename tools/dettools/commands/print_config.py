"""``detserve print-config``: a config with its bases and overrides, where each value is set, and what two differ in."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detserve.errors import DetserveError

if TYPE_CHECKING:
    import argparse

    from dettools.configs.config_source import LocatedConfig
    from dettools.configs.difference import Change
    from dettools.configs.origins import Key

_LONGEST_VALUE = 160
_SIGNS = {"added": "+", "removed": "-", "changed": "~"}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "print-config",
        help="an MMDetection config with its bases and overrides, where each value is set, what two differ in",
        description="Print a config as MMDetection sees it. It is read, not run. Passwords, tokens and keys are shown "
        "as ***. Exit code 1: the two configs of --diff differ.",
    )
    parser.add_argument(
        "config", type=Path, metavar="CONFIG|MAR", help=".py, .json or .yml with its _base_ files, or a .mar with one"
    )
    parser.add_argument("--origins", action="store_true", help="one line per value, with the file and line that set it")
    parser.add_argument("--key", metavar="KEY", help="only this part, such as model.backbone")
    parser.add_argument("--diff", type=Path, metavar="OTHER", help="what OTHER has otherwise, with both places")
    parser.add_argument("--show-secrets", action="store_true", help="do not hide passwords, tokens and keys")
    parser.add_argument("--allow-code", action="store_true", help="a config that is more than assignments is run")
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    original = parser.add_argument_group("options of MMDetection's print_config.py")
    original.add_argument("--save-path", type=Path, metavar="FILE", help="write it there too: .py, .json, .yml")
    original.add_argument(
        "--cfg-options",
        "--options",
        nargs="+",
        action="extend",
        default=[],
        metavar="K=V",
        help="set values, such as model.backbone.depth=101 train_dataloader.batch_size=4 'scale=(1333,800)'",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read, hide, print; return the exit code."""
    from dettools.configs.config_source import load_located
    from dettools.configs.config_text import flat_text, pretty_text, save_config

    if args.diff and args.save_path:
        raise DetserveError("got --save-path with --diff, expected one of them: a difference is no config.")
    located = load_located(args.config, args.cfg_options, allow_code=args.allow_code)
    config = _shown(located, args)
    if args.diff:
        other = load_located(args.diff, allow_code=args.allow_code)
        _shown(other, args)
        return _diff(located, other, args)
    if args.save_path:
        _refuse_source(args.save_path, config)
    out = sys.stderr if args.json else sys.stdout
    path, part = _part(config.values, args.key)
    if args.origins:
        _print_origins(config, path, part, out)
    elif path:
        print(pretty_text(part) if isinstance(part, dict) else f"{flat_text(part)}\n", end="", file=out)
    else:
        print(f"Config:\n{pretty_text(config.values)}", file=out)
    if args.save_path:
        for note in save_config(args.save_path, config.values):
            print(f"note: {note}", file=sys.stderr)
        print(f"Config saving at {args.save_path}", file=out)
    if args.json:
        print(json.dumps(_document(config, path, part)))
    return 0


def _shown(config: LocatedConfig, args: argparse.Namespace) -> LocatedConfig:
    """Hide the secrets, and tell the notes."""
    from dataclasses import replace

    from dettools.configs.redaction import redacted

    for note in config.notes:
        print(f"note: {note}", file=sys.stderr)
    if args.show_secrets:
        return config
    shown = redacted(config.values)
    if shown.hidden:
        keys = ", ".join(shown.hidden)
        print(f"note: {config.name}: hidden: {keys}; --show-secrets keeps them", file=sys.stderr)
    return replace(config, values=shown.values)


def _refuse_source(path: Path, config: LocatedConfig) -> None:
    """A config written over itself or its base would lose its structure, its comments, and what is hidden here."""
    try:
        read = any(path.samefile(file) for file in config.files if Path(file).exists())
    except OSError:  # no such file; one that cannot be is told where it is written
        return
    if read:
        raise DetserveError(f"--save-path: got {path}, which was read, expected another file. Nothing was changed.")


def _part(values: dict[str, Any], key: str | None) -> tuple[tuple[Key, ...], Any]:
    part: Any = values
    path: list[Key] = []
    for word in key.split(".") if key else []:
        at: Key = int(word) if isinstance(part, list | tuple) and word.isdigit() else word
        try:
            part = part[at]
        except (LookupError, TypeError):
            has = ", ".join(map(str, part)) if isinstance(part, dict) else f"a {type(part).__name__}"
            if isinstance(part, list | tuple):
                has = f"numbers below {len(part)}"
            where = ".".join(map(str, path)) or "the config"
            raise DetserveError(f"--key {key}: got {word!r}, expected a key of {where}: {has}.") from None
        path.append(at)
    return tuple(path), part


def _print_origins(config: LocatedConfig, path: tuple[Key, ...], part: Any, out: Any) -> None:
    from dettools.configs.config_source import leaves
    from dettools.configs.config_text import flat_text

    for where, value in leaves(part, path):
        origins = config.origins.of(where)
        before = f", before: {', '.join(map(str, origins.replaced))}" if origins.replaced else ""
        print(f"{'.'.join(map(str, where))} = {_cut(flat_text(value))}  # {origins.place}{before}", file=out)


def _diff(before: LocatedConfig, after: LocatedConfig, args: argparse.Namespace) -> int:
    from dettools.configs.config_text import plain
    from dettools.configs.difference import differences

    if args.key:
        _require_key(args.key, before, after)
    # Compared with their secrets, so that other ones differ, and shown without.
    changes = [_without_secrets(one, args) for one in differences(before, after) if _concerns(one, args.key)]
    out = sys.stderr if args.json else sys.stdout
    print(f"--- {before.name}\n+++ {after.name}", file=out)
    for change in changes:
        print(_change_line(change), file=out)
    told = f"{len(changes)} difference{'s' if len(changes) > 1 else ''}" if changes else "no difference"
    print(told, file=out)
    if args.json:
        rows = [
            {
                "kind": one.kind,
                "key": one.key,
                "before": plain(one.before, finite=True),
                "after": plain(one.after, finite=True),
                "before_place": None if one.before_place is None else str(one.before_place),
                "after_place": None if one.after_place is None else str(one.after_place),
            }
            for one in changes
        ]
        document = {"config": before.name, "other": after.name, "equal": not changes, "differences": rows}
        print(json.dumps(document))
    return 1 if changes else 0


def _require_key(key: str, *configs: LocatedConfig) -> None:
    """Refuse a key that no config has: that they do not differ there says nothing."""
    missing = []
    for config in configs:
        try:
            _part(config.values, key)
        except DetserveError as error:
            missing.append(error)
    if len(missing) == len(configs):
        raise missing[0]


def _concerns(change: Change, key: str | None) -> bool:
    """Whether a change lies at a key, below it, or around it."""
    return not key or f"{change.key}.".startswith(f"{key}.") or f"{key}.".startswith(f"{change.key}.")


def _without_secrets(change: Change, args: argparse.Namespace) -> Change:
    from dataclasses import replace

    from dettools.configs.redaction import redacted_at

    if args.show_secrets:
        return change
    before, after = (redacted_at(change.path, value) for value in (change.before, change.after))
    return replace(change, before=before, after=after)


def _change_line(change: Change) -> str:
    from dettools.configs.config_text import flat_text

    sides = [
        (change.before, change.before_place),
        (change.after, change.after_place),
    ]
    values = " → ".join(_cut(flat_text(value)) for value, place in sides if place)
    places = " → ".join(str(place) for _, place in sides if place)
    return f"{_SIGNS[change.kind]} {change.key}: {values}  # {places}"


def _document(config: LocatedConfig, path: tuple[Key, ...], part: Any) -> dict[str, Any]:
    from dettools.configs.config_source import leaves
    from dettools.configs.config_text import plain

    origins = {
        ".".join(map(str, where)): {
            "place": str(found.place),
            "replaced": [str(place) for place in found.replaced],
            "exact": config.origins.knows(where),
        }
        for where, _ in leaves(part, path)
        for found in [config.origins.of(where)]
    }
    return {
        "config": config.name,
        "files": list(config.files),
        "code_ran": config.code_ran,
        "values": plain(part, finite=True),
        "origins": origins,
    }


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"
