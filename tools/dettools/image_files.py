"""The image files that a command line names, and names for what is written about them."""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from detserve.errors import DetserveError

SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})


class ImageInputError(DetserveError):
    """The command line names no image."""


def find_images(arguments: Iterable[str]) -> list[Path]:
    """Return the image files: a file as it is, a folder's images with those of its subfolders, a pattern's matches.

    Each file comes once, in the order of the arguments; within a folder or a pattern, sorted.

    Raises:
        ImageInputError: an argument that names nothing.
    """
    found: dict[Path, Path] = {}
    for argument in arguments:
        path = Path(argument).expanduser()
        if path.is_file():
            files = [path]
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*") if _is_image(file))
        else:
            # Path.glob takes no absolute pattern.
            matches = (Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207
            files = sorted(file for file in matches if _is_image(file))
        if not files:
            raise ImageInputError(
                f"got {argument!r}, expected an image file, a folder with images or a pattern that matches some "
                f"({', '.join(sorted(SUFFIXES))}). Check the path."
            )
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def unique_stems(paths: Sequence[Path]) -> dict[Path, str]:
    """Return a file name without suffix for each path; no two are equal, even where case does not count.

    The stem alone if no other image has it, else with the suffix, else with the folders by which the paths differ.
    """
    root = os.path.commonpath([path.resolve().parent for path in paths]) if paths else ""
    levels = [
        [path.stem for path in paths],
        [f"{path.stem}_{path.suffix.lstrip('.')}" for path in paths],
        ["__".join(path.resolve().relative_to(root).with_suffix("").parts) for path in paths],
        ["__".join(path.resolve().relative_to(root).parts).replace(".", "_") for path in paths],
        [f"{number:06d}_{path.stem}" for number, path in enumerate(paths)],
    ]
    counts = [Counter(name.casefold() for name in level) for level in levels]
    taken: set[str] = set()
    stems: dict[Path, str] = {}
    for position, path in enumerate(paths):
        names = [level[position] for level in levels]
        free = [
            name
            for name, count in zip(names, counts, strict=True)
            if count[name.casefold()] == 1 and name.casefold() not in taken
        ]
        name = next(iter(free), names[-1])
        while name.casefold() in taken:
            name += "_"
        stems[path] = name
        taken.add(name.casefold())
    return stems


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()
