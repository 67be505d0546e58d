"""Where specs and archives lie: MODEL_STORE/NAME/NAME.yaml beside MODEL_STORE/NAME.mar."""

import os
from pathlib import Path

from detserve.errors import DetserveError


def default_model_store() -> Path:
    """Return the model store: ``$DETSERVE_MODEL_STORE``, or ``model_store`` in the working directory."""
    return Path(os.environ.get("DETSERVE_MODEL_STORE", "model_store"))


def spec_path(model_store: Path, name: str) -> Path:
    """Return where a model's spec lies."""
    return model_store / name / f"{name}.yaml"


def archive_path(model_store: Path, name: str) -> Path:
    """Return where a model's archive lies."""
    return model_store / f"{name}.mar"


def find_archive(model: str | Path, model_store: Path) -> Path:
    """Resolve a model's name or an archive's path.

    Raises:
        DetserveError: there is none; names those that there are.
    """
    direct = Path(model)
    if direct.suffix == ".mar":
        if direct.is_file():
            return direct
        raise DetserveError(f"archive: got {direct}, which is no file. Build it with `detserve archive SPEC.yaml`.")
    stored = archive_path(model_store, str(model))
    if stored.is_file():
        return stored
    there = ", ".join(sorted(path.stem for path in model_store.glob("*.mar"))) or "none"
    spec = spec_path(model_store, str(model))
    remedy = f"Build it with `detserve archive {spec}`." if spec.is_file() else "Build one with `detserve archive`."
    raise DetserveError(f"model: got {str(model)!r}, but {model_store} holds the archives: {there}. {remedy}")


def stored_archives(model_store: Path) -> list[Path]:
    """Return every archive of a model store by file name, so that the newest version's name should sort last.

    Raises:
        DetserveError: it is no folder, or there is none in it.
    """
    found = sorted(path for path in model_store.glob("*.mar") if path.is_file())
    if not found:
        what = "no archive in it" if model_store.is_dir() else "no such folder"
        raise DetserveError(
            f"model store: got {model_store} ({what}), expected at least one .mar. Build one with `detserve archive`, "
            "or name another folder with --model-store."
        )
    return found
