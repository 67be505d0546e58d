"""Which archives come into an instance's model store: checked ones, as private copies.

    archive, NAME.mar.sig ─► copy in model_store/.incoming-… (0700) ─► check the copy ─► model_store/NAME-VERSION.mar

What is checked is the copy, and the copy is what TorchServe unpacks: whoever can write where the archive came from can
no longer change it between the check and the load. TorchServe is told the copy's name and never a path
(`detserve.server.management`).
"""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from detserve.errors import ServerError
from detserve.instance import Instance
from detserve.mar import check_archive
from detserve.server.archives import ArchiveFacts, ModelSettings, read_archive
from detserve.signature import signature_path


@contextlib.contextmanager
def admitted(
    archive: Path,
    instance: Instance,
    defaults: ModelSettings,
    *,
    trusted_keys: Sequence[Path] | None,
    foreign: bool,
) -> Iterator[tuple[ArchiveFacts, Callable[[], Path]]]:
    """Copy an archive into the instance, check the copy, and yield its facts and what puts it into the model store.

    The second is a function: who learns from the facts that the archive is not wanted does not call it, and
    nothing stays.

    Args:
        archive: where it lies now.
        defaults: of what the archive does not set.
        trusted_keys: as for `check_archive`.
        foreign: admit one that was not built by detserve; pickles are refused in any case.

    Raises:
        ArchiveError: the archive must not be served.
        ServerError: it cannot be copied, or TorchServe could not serve it.
    """
    if not archive.is_file():
        raise ServerError(f"There is no archive {archive}. Build it with `detserve archive SPEC.yaml`.")
    with tempfile.TemporaryDirectory(prefix=".incoming-", dir=instance.model_store) as folder:
        # Under its own name, which the messages say.
        copy = Path(folder, archive.name)
        copy_archive(archive, copy)
        check_archive(copy, trusted_keys=trusted_keys, built_by_detserve=not foreign, pickles=False)
        facts = read_archive(copy, defaults)

        def place() -> Path:
            target = stored_archive(instance, facts.name, facts.version)
            target.unlink(missing_ok=True)
            return copy.rename(target)

        yield facts, place


def stored_archive(instance: Instance, name: str, version: str) -> Path:
    """Return where a version's archive lies in the instance's model store."""
    return instance.model_store / f"{name}-{version}.mar"


def copy_archive(archive: Path, copy: Path) -> None:
    """Copy an archive, and its signature when it has one.

    Raises:
        ServerError: there is no room, or it cannot be read; no half of it stays.
    """
    pairs = [(archive, copy), (signature_path(archive), signature_path(copy))]
    try:
        for source, target in pairs:
            if source is archive or source.exists():
                shutil.copyfile(source, target)
    except OSError as error:
        for _, target in pairs:
            with contextlib.suppress(OSError):
                target.unlink(missing_ok=True)
        raise ServerError(
            f"The archive {archive} cannot be copied into the instance ({error.strerror}). Make room in {copy.parent}, "
            "or choose another place with the environment variable DETSERVE_STATE_DIR."
        ) from error
