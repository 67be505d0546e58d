"""Which objects are occluded, which are cut into parts: told from any COCO masks, kept as JSON.

    masks of an image ─► parts (connected regions), contact with other masks, who stands in front
                              └─► separated · occluded · neither ─► OcclusionSubsets ─► occlusion.json

The two kinds are those of Zhan, Xie and Zisserman, "A Tri-Layer Plugin to Improve Occluded Detection" (BMVC 2022, arXiv
2210.10046): **separated** is a mask that an occluder cuts into more than one region; **occluded** is one that is
connected, but bordered by an occluder. The paper decides who stands in front with a network that completes masks.
Here that is told from shape alone: of two masks that touch, the one that fills more of the other's convex hull than
the other fills of its own stands in front; if neither does, each may be the other's occluder. So the subsets are not
those of the paper's files object by object.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from detserve.errors import DetserveError
from hotcoco import mask as rle_masks
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from dettools.ground_truth import GroundTruth

Rle = Mapping[str, Any]
Mask = npt.NDArray[np.bool_]
FORMAT = "detserve occlusion subsets 1"
SUBSETS = ("occluded", "separated")
_EIGHT_NEIGHBOURS = np.ones((3, 3), np.int64)


class OcclusionError(DetserveError):
    """The subsets cannot be made, or those in a file do not belong to the annotations."""


@dataclass(frozen=True)
class OcclusionRule:
    """What counts.

    Raises:
        OcclusionError: a distance below 0, or a share that is not 0 to 1.

    Attributes:
        contact_px: masks touch when they are at most so far apart; COCO's polygons leave gaps of a few pixels.
        min_contact: the share of a connected mask's outline that touches the occluder.
        min_part_contact: the share of the outline of each of two parts that touches the occluder between them.
        min_part: regions below this share of the mask are specks of the annotation, not parts.
    """

    contact_px: int = 3
    min_contact: float = 0.2
    min_part_contact: float = 0.05
    min_part: float = 0.02

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.contact_px < 0:
            raise OcclusionError(f"got a contact of {self.contact_px} px, expected 0 or more")
        for name in ("min_contact", "min_part_contact", "min_part"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise OcclusionError(f"got {name.replace('_', ' ')} {value:g}, expected a share, 0 to 1")


@dataclass(frozen=True)
class Occlusion:
    """One object of a subset, by its ids in the annotation file, with the objects that stand in front of it."""

    annotation_id: int
    image_id: int
    category_id: int
    occluders: tuple[int, ...]


@dataclass(frozen=True)
class OcclusionSubsets:
    """The two subsets of one annotation file.

    Attributes:
        annotations_sha256: of the annotation file that they were made from.
        rule: by which they were made.
        occluded: connected masks that are bordered by an occluder.
        separated: masks that an occluder cuts.
        objects: how many objects with a mask were looked at.
        split_alone: masks of several regions, with no object that could have cut them; in neither subset.
    """

    annotations_sha256: str
    rule: OcclusionRule
    occluded: tuple[Occlusion, ...] = field(repr=False)
    separated: tuple[Occlusion, ...] = field(repr=False)
    objects: int
    split_alone: int

    @property
    def kind_of(self) -> dict[int, str]:
        """Annotation id to the name of its subset."""
        return {one.annotation_id: kind for kind in SUBSETS for one in getattr(self, kind)}

    def to_json(self) -> dict[str, Any]:
        """Return what the file holds."""
        return {"format": FORMAT, **asdict(self)}


def make_subsets(
    ground_truth: GroundTruth,
    rule: OcclusionRule | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> OcclusionSubsets:
    """Look at every mask of every image; crowds are neither targets nor occluders.

    Args:
        ground_truth: annotations with masks, polygons or RLE.
        rule: what counts; the default one if None.
        progress: is told the images done and the number of all.

    Raises:
        OcclusionError: there are no masks, or an image with masks has no size.
    """
    rule = rule or OcclusionRule()
    if not ground_truth.has_masks:
        raise OcclusionError(
            f"{ground_truth.path}: got annotations without segmentation, expected masks: whether an object is occluded "
            "is told from its outline. Give annotations with masks, or subsets that were made from such with --subsets."
        )
    found: dict[str, list[Occlusion]] = {kind: [] for kind in SUBSETS}
    split_alone = objects = 0
    by_image: dict[int, list[Mapping[str, Any]]] = {image.id: [] for image in ground_truth.images}
    for one in ground_truth.annotations:
        if one.get("segmentation") and not one["iscrowd"]:
            by_image[one["image_id"]].append(one)
    for done, image in enumerate(ground_truth.images, start=1):
        annotations = by_image[image.id]
        if annotations:
            rles = [annotation_rle(one, image.height, image.width) for one in annotations]
            for place, kind, occluders in _judged(rles, rule):
                one = annotations[place]
                if kind == "split alone":
                    split_alone += 1
                else:
                    ids = tuple(int(annotations[other]["id"]) for other in occluders)
                    found[kind].append(Occlusion(one["id"], image.id, one["category_id"], ids))
        objects += len(annotations)
        if progress is not None:
            progress(done, len(by_image))
    return OcclusionSubsets(
        ground_truth.sha256, rule, tuple(found["occluded"]), tuple(found["separated"]), objects, split_alone
    )


def load_subsets(path: Path, ground_truth: GroundTruth) -> OcclusionSubsets:
    """Read subsets from JSON; every object must be in the annotations, in the same image and of the same category.

    Raises:
        OcclusionError: unreadable, the original's pickle, or not of these annotations.
    """
    if path.suffix in (".pkl", ".pickle"):
        raise OcclusionError(
            f"{path}: got a pickle, which runs code when it is read; expected JSON. Make the subsets from the "
            "annotations with --make-subsets FILE.json."
        )
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise OcclusionError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise OcclusionError(f"{path}: expected JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise OcclusionError(f"{path}: got no {FORMAT!r}, expected what --make-subsets writes")
    try:
        subsets = OcclusionSubsets(
            annotations_sha256=str(document["annotations_sha256"]),
            rule=OcclusionRule(**document["rule"]),
            objects=int(document["objects"]),
            split_alone=int(document["split_alone"]),
            **{
                kind: tuple(Occlusion(**{**one, "occluders": tuple(one["occluders"])}) for one in document[kind])
                for kind in SUBSETS
            },
        )
    except (KeyError, TypeError, ValueError) as error:
        raise OcclusionError(f"{path}: is damaged ({type(error).__name__}: {error}). Make it again.") from None
    known = {one["id"]: (one["image_id"], one["category_id"]) for one in ground_truth.annotations if not one["iscrowd"]}
    named = [one for kind in SUBSETS for one in getattr(subsets, kind)]
    strange = [one for one in named if known.get(one.annotation_id) != (one.image_id, one.category_id)]
    if strange:
        raise OcclusionError(
            f"{path}: {len(strange)} of {len(named)} objects are not in {ground_truth.path} (annotation "
            f"{strange[0].annotation_id} of image {strange[0].image_id}). Give the annotations that the subsets were "
            "made from, or make them again with --make-subsets."
        )
    return subsets


def annotation_rle(annotation: Mapping[str, Any], height: int, width: int, *, what: str = "annotation") -> Rle:
    """Return the mask of an annotation, or of a result, as one RLE: a polygon's of the image's size, else its own.

    Args:
        annotation: with ``id``, ``image_id`` and ``segmentation``.
        height, width: of the image.
        what: it is, for errors.

    Raises:
        OcclusionError: a polygon without an image size, or no readable mask.
    """
    shape = annotation["segmentation"]
    if min(height, width) < 1 and not isinstance(shape, Mapping):
        raise OcclusionError(
            f"image {annotation['image_id']} has no width and height, which its polygons need. Add them to the "
            "annotation file."
        )
    try:
        if isinstance(shape, Mapping):
            size = [int(one) for one in shape["size"]]
            if isinstance(shape["counts"], list):
                shape = rle_masks.fr_py_objects(dict(shape), *size)
            mask: Rle = {"size": size, "counts": shape["counts"]}
            rle_masks.area([dict(mask)])  # reads it: a damaged one is told here, by its id
            return mask
        merged: Rle = rle_masks.merge(rle_masks.fr_py_objects(shape, height, width))
    except (KeyError, TypeError, ValueError) as error:
        raise OcclusionError(f"{what} {annotation['id']}: its segmentation cannot be read: {error}") from None
    return merged


def require_one_size(image_id: int, found: Sequence[Rle], wanted: Sequence[Rle]) -> None:
    """Check that an image's masks can overlap: those of different sizes never do, and all would look missed.

    Raises:
        OcclusionError: two sizes.
    """
    sizes = [list(one["size"]) for one in (*wanted, *found)]
    if wrong := next((one for one in sizes if one != sizes[0]), None):
        raise OcclusionError(
            f"image {image_id}: got a mask of {wrong} (height, width), expected {sizes[0]}, as its first annotation "
            "has. Scale the masks to the image's size."
        )


@dataclass(frozen=True)
class _Window:
    """Rows and columns of an image."""

    top: int
    left: int
    bottom: int
    right: int

    def of(self, mask: Mask) -> Mask:
        return mask[self.top : self.bottom, self.left : self.right]


def _judged(rles: Sequence[Rle], rule: OcclusionRule) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """Yield the place, the kind and the occluders of each mask that is more than simply whole and free."""
    masks = [np.asarray(rle_masks.decode(dict(rle)), bool) for rle in rles]
    boxes = np.array([rle_masks.to_bbox(dict(rle)) for rle in rles]).reshape(-1, 4)
    low, high = boxes[:, :2] - rule.contact_px, boxes[:, :2] + boxes[:, 2:] + rule.contact_px
    near = ((low[:, None] < (boxes[:, :2] + boxes[:, 2:])[None]) & (high[:, None] > boxes[None, :, :2])).all(axis=2)
    np.fill_diagonal(near, val=False)
    hulls: dict[int, Rle | None] = {}
    for place, mask in enumerate(masks):
        if not boxes[place, 2:].all():
            continue
        # One pixel more, so that the outline's own neighbours are inside.
        left, top = np.maximum(low[place] - 1, 0).astype(int)
        right, bottom = (high[place] + 1).astype(int)
        window = _Window(int(top), int(left), int(bottom), int(right))
        target = window.of(mask)
        others = [int(one) for one in np.flatnonzero(near[place])]
        numbered, regions = ndimage.label(target, _EIGHT_NEIGHBOURS)
        areas = np.bincount(numbered.ravel(), minlength=regions + 1)[1:]
        parts = np.flatnonzero(areas >= rule.min_part * areas.sum()) + 1
        if not others:
            if len(parts) > 1:
                yield place, "split alone", ()
            continue
        # Where the image ends, nothing occludes.
        outline = target & ~ndimage.binary_erosion(target, _EIGHT_NEIGHBOURS, border_value=1)
        lengths = np.bincount(numbered[outline], minlength=regions + 1)
        occluders = []
        for other in others:
            reach = ndimage.maximum_filter(window.of(masks[other]), 2 * rule.contact_px + 1, mode="constant")
            touched = np.bincount(numbered[outline & reach], minlength=regions + 1)
            if len(parts) > 1:
                counts = (touched[parts] >= rule.min_part_contact * lengths[parts]) & (touched[parts] > 0)
                touches = int(counts.sum()) > 1
            else:
                touches = touched.sum() >= max(rule.min_contact * lengths.sum(), 1)
            if touches and not _is_behind(other, place, rles, masks, hulls):
                occluders.append(other)
        if occluders:
            yield place, "separated" if len(parts) > 1 else "occluded", tuple(occluders)
        elif len(parts) > 1:
            yield place, "split alone", ()


def _is_behind(one: int, other: int, rles: Sequence[Rle], masks: Sequence[Mask], hulls: dict[int, Rle | None]) -> bool:
    """Whether ``other`` fills more of the hull of ``one`` than ``one`` fills of that of ``other``."""
    return _filled(one, other, rles, masks, hulls) > _filled(other, one, rles, masks, hulls)


def _filled(hull_of: int, by: int, rles: Sequence[Rle], masks: Sequence[Mask], hulls: dict[int, Rle | None]) -> int:
    """Return how many pixels of a mask lie in another's convex hull, but not in that other mask."""
    if hull_of not in hulls:
        hulls[hull_of] = _hull(masks[hull_of])
    hull = hulls[hull_of]
    if hull is None:
        return 0
    inside = int(rle_masks.area(rle_masks.merge([dict(hull), dict(rles[by])], intersect=True)))
    shared = int(rle_masks.area(rle_masks.merge([dict(rles[hull_of]), dict(rles[by])], intersect=True)))
    return inside - shared


def _hull(mask: Mask) -> Rle | None:
    """Return the convex hull as an RLE; None of a mask without pixels."""
    rows = np.flatnonzero(mask.any(axis=1))
    if not len(rows):
        return None
    first = mask[rows].argmax(axis=1)
    last = mask.shape[1] - mask[rows][:, ::-1].argmax(axis=1)
    # The pixels' corners, not their centres: a single row has a hull too.
    points = np.concatenate([np.stack([x, rows + y], axis=1) for x in (first, last) for y in (0, 1)]).astype(np.float64)
    try:
        corners = points[ConvexHull(points).vertices]
    except QhullError:
        return None
    hull: Rle = rle_masks.merge(rle_masks.fr_py_objects([corners.ravel().tolist()], *mask.shape))
    return hull
