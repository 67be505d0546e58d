"""Packing anew what MMDetection's own script packed: its config and checkpoint move into the model store first.

OLD.mar ─► MODEL_STORE/NAME/{config, checkpoint} ─► the same arguments, as if they had been given
                        └─ anything fails ─► removed again
"""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from detserve.errors import ArchiveError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator


@contextmanager
def original_unpacked(args: argparse.Namespace, store: Path) -> Iterator[tuple[str, ...]]:
    """Put an original archive's config and checkpoint into the arguments in its place; yield notes for people.

    Args:
        args: of `archive`; nothing is done when its first one is no `.mar`.
        store: the model store.

    Raises:
        DetserveError: it is no archive of MMDetection's script, or would be overwritten by its own repair.
    """
    if args.spec is None or args.spec.suffix != ".mar":
        yield ()
        return
    from detserve.mmdet_archive import read_original

    old: Path = args.spec
    store.mkdir(parents=True, exist_ok=True)
    kept: list[Path] = []
    with tempfile.TemporaryDirectory(prefix=".repair-", dir=store) as place:
        original = read_original(old, Path(place))
        args.name = args.name or original.name
        args.model_version = args.model_version or original.version
        out = args.out or store / f"{args.name}.mar"
        if out.exists() and out.resolve() == old.resolve():
            raise ArchiveError(
                f"archive {old}: would be overwritten by what is made of it. Give another path with --out, or another "
                "--name."
            )
        folder = store / args.name
        folder.mkdir(exist_ok=True)
        try:
            for source in (original.config, original.checkpoint):
                target = folder / source.name
                _require_free(target, force=args.force)
                source.replace(target)
                kept.append(target)
            args.spec, args.checkpoint = kept
            yield original.notes
        except BaseException:
            for path in kept:
                path.unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()
            raise


def _require_free(target: Path, *, force: bool) -> None:
    if target.exists() and not force:
        raise ArchiveError(f"{target}: exists already. Replace it with --force, or give another --name.")
