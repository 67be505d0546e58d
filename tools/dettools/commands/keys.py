"""``detserve keys``: make a pair of signing keys, sign an archive, show who signed one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``keys`` and its actions."""
    parser = subparsers.add_parser(
        "keys",
        help="make signing keys, sign archives (Ed25519)",
        description="Make a pair of Ed25519 keys, sign an archive that exists, or show which key signed one. The "
        "private key stays where archives are built; servers get the public one (--require-signature).",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    new = actions.add_parser("new", parents=[common], help="write NAME.pem (private) and NAME.pub.pem into a folder")
    new.add_argument("folder", type=Path, metavar="DIR")
    new.add_argument("--name", default="signing", help="default: %(default)s")
    sign = actions.add_parser("sign", parents=[common], help="write ARCHIVE.sig beside an archive")
    sign.add_argument("archive", type=Path, metavar="FILE.mar")
    sign.add_argument("--key", type=Path, required=True, metavar="KEY.pem", help="private key")
    show = actions.add_parser(
        "show", parents=[common], help="the id of a public key, or the key that an archive's signature names, unchecked"
    )
    show.add_argument("file", type=Path, metavar="KEY.pub.pem|FILE.mar")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run one action; return the exit code."""
    facts, sentence = {"new": _new, "sign": _sign, "show": _show}[args.action](args)
    print(sentence)
    if args.json:
        print(json.dumps(facts))
    return 0


def _new(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from detserve.signature import new_key_pair

    pair = new_key_pair(args.folder, args.name)
    facts = {"private": str(pair.private), "public": str(pair.public), "key": pair.key}
    return facts, f"{pair.private} (private: keep it), {pair.public} (for servers), key {pair.key}"


def _sign(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from detserve.mar import check_archive
    from detserve.signature import sign_archive, signature_path

    check_archive(args.archive)
    signature = sign_archive(args.archive, args.key)
    path = signature_path(args.archive)
    facts = {"archive": str(args.archive), "signature": str(path), "key": signature.key, "sha256": signature.sha256}
    return facts, f"{path}: signed by the key {signature.key}"


def _show(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from detserve.errors import ArchiveError
    from detserve.signature import load_public_keys, read_signature, signature_path

    if args.file.suffix != ".mar":
        (key,) = load_public_keys([args.file])
        return {"file": str(args.file), "key": key}, f"{args.file}: key {key}"
    signature = read_signature(args.file)
    if signature is None:
        raise ArchiveError(
            f"archive {args.file}: there is no {signature_path(args.file).name} beside it. Sign it: detserve keys sign."
        )
    facts = {"file": str(args.file), "key": signature.key, "sha256": signature.sha256}
    check = "check it with `detserve verify --trusted-key`"
    return facts, f"{args.file}: its signature names the key {signature.key}; {check}"
