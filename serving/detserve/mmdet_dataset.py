"""The data set that an MMDetection config tests on: where its annotations and images lie, and its classes.

    CONFIG.py ─► values, not run ─► test_dataloader.dataset ─► wrappers taken off ─► data_root + ann_file + data_prefix
                                                        found from the current folder, else from the config's

MMDetection numbers labels by the order of the annotation file and names them by the order of the config. Where the two
differ it serves wrong names and never notices; here that is told.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from detserve.errors import DetserveError
from detserve.mmdet_config import read_config

Split = Literal["test", "val", "train"]

ROOT_VARIABLE = "MMDET_DATASETS"
"""Takes the place of the config's ``data_root``, as in MMDetection's own tools."""
# Their annotation files are COCO's, their AP is COCO's.
_COCO = {
    *("CocoDataset", "CityscapesDataset", "DeepFashionDataset", "iSAIDDataset", "ADE20KInstanceDataset"),
    *("Objects365V1Dataset", "Objects365V2Dataset", "V3DetDataset"),
}
_OTHER = {
    **dict.fromkeys(("VOCDataset", "XMLDataset", "WIDERFaceDataset"), "one XML file an image"),
    **dict.fromkeys(("LVISDataset", "LVISV05Dataset", "LVISV1Dataset"), "LVIS, whose AP is federated and not COCO's"),
    **dict.fromkeys(("OpenImagesDataset", "OpenImagesChallengeDataset"), "CSV files of Open Images"),
    **dict.fromkeys(("CocoPanopticDataset", "ADE20KPanopticDataset"), "segments of panoptic segmentation"),
    **dict.fromkeys(("YouTubeVISDataset", "MOTChallengeDataset", "BaseVideoDataset"), "videos"),
    "CrowdHumanDataset": "odgt lines of CrowdHuman",
}
_WRAPPERS = ("RepeatDataset", "ClassBalancedDataset", "MultiImageMixDataset")


class DatasetError(DetserveError):
    """A config's data set cannot be found, or is none that can be evaluated."""


@dataclass(frozen=True)
class ConfigDataset:
    """What a config names.

    Attributes:
        annotations: COCO annotation file; it exists.
        images: folder that ``file_name`` begins in; it exists.
        class_names: that the data set is restricted to, in the config's order; empty for all of the file.
        type: MMDetection's class.
        notes: what a person should know.
    """

    annotations: Path
    images: Path
    class_names: tuple[str, ...]
    type: str
    notes: tuple[str, ...]


def read_dataset(
    config: Path,
    *,
    split: Split = "test",
    number: int | None = None,
    annotations: Path | None = None,
    images: Path | None = None,
    allow_code: bool = False,
) -> ConfigDataset:
    """Find a config's data set.

    Args:
        config: MMDetection's; read without running it.
        split: whose data loader is meant.
        number: which one of several that are joined, from 1.
        annotations: instead of the config's; its classes then do not matter.
        images: instead of the config's.
        allow_code: a config that is not literal is run.

    Raises:
        DatasetError: there is none, its files are not there, or they are not COCO's.
        ConfigError: the config cannot be read.
    """
    values = read_config(config, allow_code=allow_code).values
    dataset, notes = _unwrapped(_of_split(values, split, config), number, f"{split}_dataloader.dataset")
    kind = str(dataset.get("type", "")).rpartition(".")[2]
    if kind in _OTHER and annotations is None:
        raise DatasetError(
            f"{split}_dataloader: got a {kind} ({_OTHER[kind]}), expected annotations of COCO's kind. Convert them to "
            "a COCO JSON file and give it with --annotations, its pictures with --images."
        )
    backend = dataset.get("backend_args")
    if isinstance(backend, Mapping) and backend.get("backend", "local") not in ("local", "disk"):
        raise DatasetError(
            f"{split}_dataloader: got files on {backend['backend']!r}, expected this machine's. Copy them here and "
            "give --annotations and --images."
        )
    root, moved = _root(dataset, values)
    notes += [moved] if moved else []
    names: tuple[str, ...] = ()
    if annotations is None:
        annotations = _found(_joined(root, dataset.get("ann_file")), "ann_file", "--annotations", config, folder=False)
        names = _class_names(dataset, root, config)
        notes += _about_categories(annotations, names, kind)
        notes += _about_evaluator(values, split, dataset, root)
    if images is None:
        prefix = dataset.get("data_prefix")
        prefix = prefix if isinstance(prefix, Mapping) else {}
        inner = prefix.get("img", prefix.get("img_path", ""))
        images = _found(_joined(root, inner), "data_prefix", "--images", config, folder=True)
    return ConfigDataset(annotations, images, names, kind, tuple(notes))


def _of_split(values: Mapping[str, Any], split: str, config: Path) -> Mapping[str, Any]:
    loader = values.get(f"{split}_dataloader")
    dataset = loader.get("dataset") if isinstance(loader, Mapping) else None
    if isinstance(dataset, Mapping):
        return dataset
    there = [name for name in ("test", "val", "train") if isinstance(values.get(f"{name}_dataloader"), Mapping)]
    remedy = f"Take another with --split: {', '.join(there)}" if there else "Give --annotations and --images"
    old = " It is a config of MMDetection 2, which names its data otherwise." if "data" in values and not there else ""
    raise DatasetError(f"config {config.name}: got no {split}_dataloader with a dataset.{old} {remedy}.")


def _unwrapped(dataset: Mapping[str, Any], number: int | None, place: str) -> tuple[Mapping[str, Any], list[str]]:
    """Take the wrappers off that only repeat or join."""
    notes: list[str] = []
    while True:
        kind = str(dataset.get("type", "")).rpartition(".")[2]
        joined = dataset.get("datasets")
        if isinstance(joined, Sequence) and not isinstance(joined, str) and joined:
            dataset = _one_of(joined, number, place)
            place = f"{place}.datasets"
        elif isinstance(dataset.get("dataset"), Mapping) and (kind in _WRAPPERS or "ann_file" not in dataset):
            notes.append(f"{kind} is taken off: every image is evaluated once")
            dataset = dataset["dataset"]
            place = f"{place}.dataset"
        elif not isinstance(dataset.get("ann_file", ""), str):
            raise DatasetError(
                f"{place}: got ann_file {dataset['ann_file']!r}, expected one file. Give it with --annotations."
            )
        else:
            return dataset, notes


def _one_of(joined: Sequence[Any], number: int | None, place: str) -> Mapping[str, Any]:
    if number is None and len(joined) == 1:
        number = 1
    if number is not None and 1 <= number <= len(joined) and isinstance(joined[number - 1], Mapping):
        chosen: Mapping[str, Any] = joined[number - 1]
        return chosen
    there = ", ".join(
        f"{place_ + 1}: {one.get('ann_file') or one.get('type')}" if isinstance(one, Mapping) else str(place_ + 1)
        for place_, one in enumerate(joined)
    )
    got = f"{len(joined)} data sets joined" if number is None else f"number {number} of {len(joined)}"
    raise DatasetError(
        f"{place}: got {got}, expected one: image and category ids of several would be mixed up. Choose with "
        f"--dataset N ({there})."
    )


def _root(dataset: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[str, str]:
    """Return the data root, and a note when the environment moves it."""
    root = str(dataset.get("data_root") or "")
    moved, own = os.environ.get(ROOT_VARIABLE), values.get("data_root")
    if moved and root and (root == own or not own):
        return moved, f"data_root is {moved}, as ${ROOT_VARIABLE} says"
    return root, ""


def _joined(root: str, name: Any) -> str:
    text = str(name or "")
    if not root or Path(text).is_absolute() or "://" in text:
        return text or root
    return f"{root.rstrip('/')}/{text}"


def _found(text: str, key: str, option: str, config: Path, *, folder: bool) -> Path:
    """Find a path as MMDetection does, from the current folder, else from the config's."""
    what = "folder" if folder else "file"
    if "://" in text:
        raise DatasetError(f"{key}: got {text}, expected a {what} on this machine. Copy it and give it with {option}.")
    if not text and not folder:
        raise DatasetError(f"config {config.name}: its data set names no {key}. Give the {what} with {option}.")
    tried = list(dict.fromkeys([Path(text).absolute(), (config.parent / text).absolute()]))
    for path in tried:
        if path.is_dir() if folder else path.is_file():
            return path
    places = " and ".join(str(path) for path in tried)
    raise DatasetError(
        f"{key}: got {text or '.'}, which is no {what} from the current folder nor from the config's ({places}). Call "
        f"from the folder that data_root begins in, set {ROOT_VARIABLE}, or give the {what} with {option}."
    )


def _class_names(dataset: Mapping[str, Any], root: str, config: Path) -> tuple[str, ...]:
    meta = dataset.get("metainfo")
    named: Any = meta.get("classes", meta.get("CLASSES")) if isinstance(meta, Mapping) else None
    if isinstance(named, str):
        # MMEngine takes a text for a file with a name a line, and for the one name when there is no such file.
        for path in (Path(named), Path(root, named), config.parent / named):
            if path.is_file():
                return tuple(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())
        return (named,)
    return tuple(str(name) for name in named) if isinstance(named, Sequence) else ()


def _about_categories(annotations: Path, names: tuple[str, ...], kind: str) -> Iterator[str]:
    try:
        document = json.loads(annotations.read_bytes())
        entries = [str(one["name"]) for one in document["categories"]]
        list(document["images"]), list(document["annotations"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DatasetError(
            f"ann_file: got {annotations} of a {kind}, which is no COCO annotation file ({type(error).__name__}: "
            f"{error}). Convert it to COCO JSON and give it with --annotations."
        ) from error
    if kind not in _COCO:
        yield f"{kind} is not MMDetection's own; its annotation file is COCO's, and is read as such"
    if not names:
        return
    absent = [name for name in names if name not in entries]
    if absent:
        yield (
            f"{len(absent)} of the config's {len(names)} classes are not in {annotations.name} "
            f"({', '.join(absent[:5])}): MMDetection leaves them out without a word"
        )
    in_file = [name for name in entries if name in names]
    in_config = [name for name in names if name in entries]
    if in_file != in_config:
        at = next(place for place, (a, b) in enumerate(zip(in_file, in_config, strict=False)) if a != b)
        yield (
            f"classes: {annotations.name} has them in another order than the config ({in_file[at]!r} before "
            f"{in_config[at]!r}). MMDetection trains and evaluates by the file's order and names labels by the "
            "config's, so that a model trained so answers with wrong names; here classes are joined by their names, "
            "and such a model's AP is low. Put the config's classes in the file's order and pack the model again"
        )


def _about_evaluator(values: Mapping[str, Any], split: str, dataset: Mapping[str, Any], root: str) -> Iterator[str]:
    evaluator = values.get(f"{split}_evaluator")
    if not isinstance(evaluator, Mapping):
        return
    its = evaluator.get("ann_file")
    own = _joined(root, dataset.get("ann_file"))
    if isinstance(its, str) and os.path.normpath(its) != os.path.normpath(own):
        yield f"{split}_evaluator reads {its}, the data set {own}; the data set's is taken"
    metric = evaluator.get("metric")
    if "segm" in (metric if isinstance(metric, list | tuple) else [metric]):
        yield "the config measures masks too: --iou-type bbox segm"
    if isinstance(dataset.get("indices"), int | Sequence):
        yield f"the data set takes a part of its images (indices={dataset['indices']!r}); here all are evaluated"
