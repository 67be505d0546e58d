"""Packing anew what MMDetection's own script packed: its config and checkpoint move into the model store first.

OLD.mar ─► MODEL_STORE/NAME/{config, checkpoint} ─► the same arguments, as if they had been given
                        └─ anything fails ─► removed again, and what had stood there before put back
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from detserve.errors import ArchiveError
from detserve.model_store import archive_path, spec_path

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence


@contextmanager
def original_unpacked(args: argparse.Namespace, store: Path) -> Iterator[tuple[str, ...]]:
    """Put an original archive's config and checkpoint into the arguments in its place; yield notes for people.

    When the caller's work fails, the model store is as it was before.

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
    with tempfile.TemporaryDirectory(prefix=".repair-", dir=store) as place:
        original = read_original(old, Path(place), name=args.name, version=args.model_version)
        args.name, args.model_version = original.name, original.version
        out = args.out or archive_path(store, args.name)
        if out.exists() and out.resolve() == old.resolve():
            raise ArchiveError(
                f"archive {old}: would be overwritten by what is made of it. Give another path with --out, or another "
                "--name."
            )
        folder = store / args.name
        sources = (original.config, original.checkpoint)
        targets = [folder / source.name for source in sources]
        for target in targets:
            _require_free(target, force=args.force)
        with _as_before([*targets, spec_path(store, args.name), out], folder, store):
            for source, target in zip(sources, targets, strict=True):
                source.replace(target)
            args.spec, args.checkpoint = targets
            yield original.notes


@contextmanager
def _as_before(files: Sequence[Path], folder: Path, store: Path) -> Iterator[None]:
    """Keep files aside while others take their places; whatever is raised, they come back, and new ones go.

    Args:
        files: that may be there.
        folder: is made, and removed again when it stays empty.
        store: where they are kept, on the disk where they lie.
    """
    aside = Path(tempfile.mkdtemp(prefix=".before-", dir=store))
    kept = {path: aside / str(number) for number, path in enumerate(files) if path.exists()}
    try:
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise ArchiveError(f"folder {folder}: cannot be made ({error}). Give another --name.") from error
        for path, copy in kept.items():
            _keep(path, copy)
        yield
    except BaseException:
        for path in files:
            if path not in kept:
                path.unlink(missing_ok=True)
            elif kept[path].exists():
                shutil.move(kept[path], path)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        # Not with what is in it: a file that could not be put back stays there.
        aside.rmdir()
        raise
    shutil.rmtree(aside)


def _keep(path: Path, copy: Path) -> None:
    """Copy a file; under its last name only when it is whole, so that half of one is never put back."""
    partial = copy.with_suffix(".partial")
    try:
        shutil.copy2(path, partial)
        partial.replace(copy)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _require_free(target: Path, *, force: bool) -> None:
    if target.exists() and not force:
        raise ArchiveError(f"{target}: exists already. Replace it with --force, or give another --name.")
