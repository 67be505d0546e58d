"""The data sets that can be downloaded: their parts, where they lie, and what is known for certain of each file.

Sizes and SHA-256 of COCO's files are those that TensorFlow Datasets records, VOC's MD5 those of torchvision. A file
without a digest has none that is publicly certain: what came is recorded beside it and compared ever after.
"""

from dataclasses import dataclass

from detserve.errors import DetserveError

_COCO = ("https://s3.amazonaws.com/images.cocodataset.org", "http://images.cocodataset.org")
_LVIS = ("https://dl.fbaipublicfiles.com/LVIS", "https://s3-us-west-2.amazonaws.com/dl.fbaipublicfiles.com/LVIS")
_VOC = ("https://thor.robots.ox.ac.uk/pascal/VOC", "http://host.robots.ox.ac.uk/pascal/VOC")
_OBJECTS365 = "https://dorc.ks3-cn-beijing.ksyun.com/data-set/2020Objects365%E6%95%B0%E6%8D%AE%E9%9B%86"
_REFER = "https://bvisionweb1.cs.unc.edu/licheng/referit/data"
_PLACES = "https://raw.githubusercontent.com/CSAILVision/placeschallenge/master/instancesegmentation"


class DownloadError(DetserveError):
    """A data set, a part or a file cannot be downloaded, or what came is not what was expected."""


@dataclass(frozen=True)
class Part:
    """One file of a data set.

    Attributes:
        name: by which ``--parts`` names it; the files of a part that has several share it.
        urls: where it lies, tried in this order.
        path: where it is kept, relative to the folder of the data set.
        size: bytes; None where not known for certain.
        digest: ``sha256:…`` or ``md5:…``; empty where none is publicly certain.
        unpack_to: the folder for its members, relative to that of the data set.
        usual: whether it is downloaded when no parts are named.
    """

    name: str
    urls: tuple[str, ...]
    path: str
    size: int | None = None
    digest: str = ""
    unpack_to: str = "."
    usual: bool = True

    @property
    def is_archive(self) -> bool:
        """Whether it can be unpacked."""
        return self.path.endswith((".zip", ".tar", ".tar.gz", ".tgz"))


@dataclass(frozen=True)
class DataSet:
    """A data set by the name that ``--dataset-name`` takes, with its title and parts."""

    name: str
    title: str
    parts: tuple[Part, ...]

    @property
    def part_names(self) -> tuple[str, ...]:
        """The names of the parts, each once."""
        return tuple(dict.fromkeys(part.name for part in self.parts))

    def chosen(self, names: list[str]) -> tuple[Part, ...]:
        """Return the named parts, all for ``all``, the usual ones for none.

        Raises:
            DownloadError: there is no such part.
        """
        if unknown := [name for name in names if name not in (*self.part_names, "all")]:
            raise DownloadError(
                f"--parts: got {', '.join(unknown)}, expected parts of {self.name}: "
                f"{', '.join(self.part_names)}, or all."
            )
        if "all" in names:
            return self.parts
        return tuple(part for part in self.parts if (part.name in names if names else part.usual))


def data_set(name: str) -> DataSet:
    """Find a data set by name.

    Raises:
        DownloadError: there is none of that name.
    """
    key = _ALIASES.get(name, name)
    if key not in DATA_SETS:
        raise DownloadError(f"--dataset-name: got {name!r}, expected one of {', '.join(DATA_SETS)}.")
    return DATA_SETS[key]


def _coco(name: str, where: str, size: int | None = None, sha256: str = "", *, usual: bool = True, part: str) -> Part:
    urls = tuple(f"{host}/{where}/{name}" for host in _COCO)
    return Part(part, urls, name, size, f"sha256:{sha256}" if sha256 else "", usual=usual)


def _voc(name: str, year: int, size: int | None, md5: str, part: str) -> Part:
    urls = tuple(f"{host}/voc{year}/{name}" for host in _VOC)
    return Part(part, urls, name, size, f"md5:{md5}" if md5 else "")


_TRAIN2017 = _coco(
    "train2017.zip",
    "zips",
    19_336_861_798,
    "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
    part="train",
)
_VAL2017 = _coco(
    "val2017.zip",
    "zips",
    815_585_330,
    "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
    part="val",
)
_TRAIN2014 = _coco(
    "train2014.zip",
    "zips",
    13_510_573_713,
    "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
    part="train",
)

_COCO2017 = (
    _TRAIN2017,
    _VAL2017,
    _coco(
        "annotations_trainval2017.zip",
        "annotations",
        252_907_541,
        "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
        part="annotations",
    ),
    _coco(
        "test2017.zip",
        "zips",
        6_646_970_404,
        "c7908c3c9f94ba2f3340ebbeec58c25db6be8774f18d68c2f15d0e369d95baba",
        usual=False,
        part="test",
    ),
    _coco(
        "image_info_test2017.zip",
        "annotations",
        1_144_034,
        "e52f412dd7195ac8f98d782b44c6dd30ea10241e9f42521f67610fbe055a74f8",
        usual=False,
        part="test-info",
    ),
    _coco(
        "panoptic_annotations_trainval2017.zip",
        "annotations",
        860_725_834,
        "c05f76d2129b6b561eb70efe16e7006df62f73fb92889132d373b9d90e31a370",
        usual=False,
        part="panoptic",
    ),
    _coco("stuff_annotations_trainval2017.zip", "annotations", usual=False, part="stuff"),
    _coco("unlabeled2017.zip", "zips", usual=False, part="unlabeled"),
    _coco("image_info_unlabeled2017.zip", "annotations", usual=False, part="unlabeled-info"),
)
_COCO2014 = (
    _TRAIN2014,
    _coco(
        "val2014.zip",
        "zips",
        6_645_013_297,
        "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
        part="val",
    ),
    _coco(
        "annotations_trainval2014.zip",
        "annotations",
        252_872_794,
        "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
        part="annotations",
    ),
    _coco(
        "test2014.zip",
        "zips",
        6_660_437_059,
        "ead40c62230cb2cf70ff4c8b4c70abdc260a7556e77b3282621d06d8e2e35bdf",
        usual=False,
        part="test",
    ),
    _coco(
        "image_info_test2014.zip",
        "annotations",
        763_464,
        "7cecc66f6b09c1671c1896a1bcc1f35eb09b7fcf00a5c18420a5f0f5983dc8c9",
        usual=False,
        part="test-info",
    ),
)
_LVIS_V1 = tuple(
    Part(split, tuple(f"{host}/lvis_v1_{split}.json.zip" for host in _LVIS), f"lvis_v1_{split}.json.zip")
    for split in ("train", "val")
)
_LVIS_IMAGES = tuple(
    Part(f"{part.name}-images", part.urls, part.path, part.size, part.digest, usual=False)
    for part in (_TRAIN2017, _VAL2017)
)
_VOC2007 = (
    _voc("VOCtrainval_06-Nov-2007.tar", 2007, 460_032_000, "c52e279531787c972589f7e41ab4ae64", "trainval"),
    _voc("VOCtest_06-Nov-2007.tar", 2007, 451_020_800, "b6e924de25625d8de591ea690078ad9f", "test"),
    _voc("VOCdevkit_08-Jun-2007.tar", 2007, None, "", "devkit"),
)
_VOC2012 = (_voc("VOCtrainval_11-May-2012.tar", 2012, 1_999_639_040, "6cd6e144f989b92b3379bac3b3de84fd", "trainval"),)


def _objects365(where: str, part: str, kept: str, unpack_to: str) -> Part:
    return Part(part, (f"{_OBJECTS365}/{where}",), f"{kept}/{where.rpartition('/')[2]}", unpack_to=unpack_to)


_OBJECTS365V2 = (
    _objects365("train/zhiyuan_objv2_train.tar.gz", "train-annotations", "train_zip", "train"),
    _objects365("val/zhiyuan_objv2_val.json", "val-annotations", "val", "val"),
    *(_objects365(f"train/patch{number}.tar.gz", "train", "train_zip", "train") for number in range(51)),
    *(
        _objects365(f"val/images/v{1 if number < 16 else 2}/patch{number}.tar.gz", "val", "val", "val")
        for number in range(44)
    ),
)
_ADE20K = (
    Part(
        "images",
        ("http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",),
        "ADEChallengeData2016.zip",
    ),
    Part(
        "instances",
        ("http://sceneparsing.csail.mit.edu/data/ChallengeData2017/annotations_instance.tar",),
        "annotations_instance.tar",
        unpack_to="ADEChallengeData2016",
    ),
    *(Part("categories", (f"{_PLACES}/{name}",), name) for name in ("imgCatIds.json", "categoryMapping.txt")),
)
_REFCOCO = (
    Part("images", _TRAIN2014.urls, _TRAIN2014.path, _TRAIN2014.size, _TRAIN2014.digest),
    *(Part(name, (f"{_REFER}/{name}.zip",), f"{name}.zip") for name in ("refcoco", "refcoco+", "refcocog")),
)
_BALLOON = (
    Part(
        "images",
        (
            "https://github.com/matterport/Mask_RCNN/releases/download/v2.1/balloon_dataset.zip",
            "https://download.openmmlab.com/mmyolo/data/balloon_dataset.zip",
        ),
        "balloon_dataset.zip",
    ),
)

DATA_SETS: dict[str, DataSet] = {
    one.name: one
    for one in (
        DataSet("coco2017", "COCO 2017", _COCO2017),
        DataSet("coco2014", "COCO 2014", _COCO2014),
        DataSet("lvis", "LVIS 1.0, annotations of COCO 2017's photographs", (*_LVIS_V1, *_LVIS_IMAGES)),
        DataSet("voc2007", "PASCAL VOC 2007", _VOC2007),
        DataSet("voc2012", "PASCAL VOC 2012", _VOC2012),
        DataSet("balloon", "Balloon, a small set of one class", _BALLOON),
        DataSet("objects365v2", "Objects365 2020", _OBJECTS365V2),
        DataSet("ade20k_2016", "ADE20K, scene parsing challenge 2016", _ADE20K),
        DataSet("refcoco", "RefCOCO, RefCOCO+ and RefCOCOg", _REFCOCO),
    )
}
_ALIASES = {"ade20k": "ade20k_2016"}
