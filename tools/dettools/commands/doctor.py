"""``detserve doctor``: what keeps a server from starting or a model from being served, each with its remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from dettools.diagnosis import Finding


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "doctor",
        help="find what keeps a server from starting, with the remedy",
        description="Look at Python, torch, CUDA, TorchServe, Java, onnxruntime, ports, token, disk and the archives "
        "of the model store; or at the archives that are named, alone. Of an archive that MMDetection's "
        "mmdet2torchserve.py wrote, everything that is wrong is told, and the command that repairs it; nothing in it "
        "is run. With --security: what the running instance leaves open. Exit code 0: nothing fails, or is open; 1: "
        "something does, or is.",
    )
    parser.add_argument("archives", nargs="*", type=Path, metavar="FILE.mar", help="look at these alone")
    parser.add_argument("--security", action="store_true", help="what the running instance leaves open, and the remedy")
    parser.add_argument("--instance", metavar="NAME", help="default: $DETSERVE_INSTANCE or default")
    parser.add_argument("--model-store", type=Path, metavar="DIR", help="default: $DETSERVE_MODEL_STORE or model_store")
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Diagnose; return the exit code."""
    from detserve.instance import Instance
    from detserve.model_store import default_model_store
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from dettools.diagnosis import diagnose

    if args.security:
        from dettools.security_diagnosis import diagnose_security

        findings = diagnose_security(Instance.named(args.instance))
    elif args.archives:
        findings = [finding for path in args.archives for finding in _of_archive(path)]
    else:
        findings = diagnose(Instance.named(args.instance), args.model_store or default_model_store())
    failed = [finding for finding in findings if finding.state == "fail"]
    if args.json:
        print(json.dumps({"ok": not failed, "findings": [vars(finding) for finding in findings]}))
        return 1 if failed else 0
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    for finding in findings:
        text = f"{finding.found}\n→ {finding.remedy}" if finding.remedy else finding.found
        table.add_row(Text(finding.state, style=colours[finding.state]), Text(finding.subject), Text(text))
    Console().print(table)
    return 1 if failed else 0


def _of_archive(path: Path) -> list[Finding]:
    from detserve.mmdet_archive import is_original

    from dettools.diagnosis import diagnose_archive
    from dettools.original_archive import diagnose_original

    return diagnose_original(path) if is_original(path) else [diagnose_archive(path)]
