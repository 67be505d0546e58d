"""Classes and weights of MMDetection's checkpoints, without MMDetection."""

import pytest
import torch
from dethandlers.detections import Category
from detserve.errors import CheckpointError, SpecError
from detserve.mmdet_checkpoint import (
    config_class_names,
    config_dataset_type,
    mmdet_categories,
    model_class_count,
    naming_notes,
    read_checkpoint,
    require_fit,
)
from safetensors.torch import save_file

STATE = {"backbone.weight": torch.ones(2)}
CONFIG = {"model": {"bbox_head": {"num_classes": 2}}}


@pytest.mark.parametrize(
    "meta",
    [
        {"dataset_meta": {"classes": ("cat", "dog"), "palette": [[1, 2, 3]]}},
        {"dataset_meta": {"CLASSES": ["cat", "dog"]}},
        {"CLASSES": ("cat", "dog"), "mmdet_version": "2.28"},
    ],
)
def test_a_checkpoint_names_its_classes(tmp_path, meta):
    torch.save({"state_dict": STATE, "meta": meta, "message_hub": {}}, tmp_path / "a.pth")
    read = read_checkpoint(tmp_path / "a.pth")
    assert read.class_names == ("cat", "dog")
    assert list(read.state) == ["backbone.weight"]
    assert mmdet_categories(CONFIG, read.class_names) == (Category(1, "cat", 0), Category(2, "dog", 1))


def test_one_class_may_be_written_without_a_tuple(tmp_path):
    torch.save({"state_dict": STATE, "meta": {"CLASSES": "face"}}, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth").class_names == ("face",)


def test_bare_weights_name_none(tmp_path):
    torch.save(STATE, tmp_path / "a.pth")
    save_file(STATE, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        read = read_checkpoint(tmp_path / name)
        assert (read.class_names, list(read.state)) == ((), ["backbone.weight"])


class Command:
    def __reduce__(self):
        return print, ("executed",)


def test_a_checkpoint_that_would_run_something_is_refused(tmp_path, capsys):
    torch.save({"state_dict": STATE, "meta": Command()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="refused, nothing was executed"):
        read_checkpoint(tmp_path / "a.pth")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("model", "count"),
    [
        ({"bbox_head": {"num_classes": 3}}, 3),
        ({"rpn_head": {"num_classes": 1}, "roi_head": {"bbox_head": {"num_classes": 4}}}, 4),
        ({"roi_head": {"bbox_head": [{"num_classes": 5}] * 3, "mask_head": {"num_classes": 5}}}, 5),
        ({"mask_head": {"num_classes": 6}}, 6),
        ({"panoptic_head": {"num_things_classes": 7, "num_stuff_classes": 0}}, 7),
        ({"detector": {"bbox_head": {"num_classes": 8}}}, 8),
        ({"backbone": {"num_classes": 9}}, None),
    ],
)
def test_a_config_tells_how_many_classes_its_model_has(model, count):
    assert model_class_count(model) == count


def test_the_config_names_classes_too_also_inside_wrappers():
    inner = {"type": "CocoDataset", "metainfo": {"CLASSES": ("cat", "dog")}}
    for dataset in (inner, {"type": "RepeatDataset", "dataset": inner}, {"type": "ConcatDataset", "datasets": [inner]}):
        config = CONFIG | {"test_dataloader": {"dataset": dataset}}
        assert config_class_names(config) == ("cat", "dog")
        assert config_dataset_type(config) == "CocoDataset"
        assert [one.name for one in mmdet_categories(config, ())] == ["cat", "dog"]
        assert [one.name for one in mmdet_categories(config, ("x", "y"))] == ["x", "y"]


def test_classes_are_never_guessed():
    with pytest.raises(SpecError, match="neither the checkpoint nor the config names the classes"):
        mmdet_categories(CONFIG, ())
    with pytest.raises(SpecError, match=r"got 3 from the data set|got 3 from data set type .*expected 2"):
        mmdet_categories(CONFIG, (), of_dataset_type=("a", "b", "c"))
    with pytest.raises(SpecError, match="got 1 from the checkpoint"):
        mmdet_categories(CONFIG, ("a",))


def test_given_categories_are_taken_in_their_order_or_by_their_labels():
    ordered = [Category(7, "a", -1), Category(9, "b", -1)]
    assert mmdet_categories(CONFIG, ("x", "y"), given=ordered) == (Category(7, "a", 0), Category(9, "b", 1))
    labelled = [Category(7, "a", 1), Category(9, "b", 0)]
    assert mmdet_categories(CONFIG, (), given=labelled) == tuple(labelled)
    with pytest.raises(SpecError, match="the categories given"):
        mmdet_categories(CONFIG, (), given=[Category(7, "a", 1), Category(9, "b", 2)])


NAMED = CONFIG | {"test_dataloader": {"dataset": {"type": "CocoDataset", "metainfo": {"classes": ("cat", "dog")}}}}
SWAPPED = (Category(2, "dog", -1), Category(1, "cat", -1))


def test_given_categories_with_the_checkpoints_names_are_joined_by_name_whatever_their_order():
    joined = (Category(2, "dog", 1), Category(1, "cat", 0))
    assert mmdet_categories(CONFIG, ("cat", "dog"), given=SWAPPED) == joined
    assert mmdet_categories(NAMED, (), given=SWAPPED) == joined
    # The checkpoint knows better than the config, and who states labels better than both.
    assert mmdet_categories(NAMED, ("dog", "cat"), given=SWAPPED) == (Category(2, "dog", 0), Category(1, "cat", 1))
    stated = (Category(2, "dog", 0), Category(1, "cat", 1))
    assert mmdet_categories(CONFIG, ("cat", "dog"), given=stated) == stated
    for known in (("cat", "dog"), ("dog", "cat")):
        assert naming_notes(CONFIG, known, SWAPPED) == ()


def test_categories_that_are_named_otherwise_go_by_order_and_that_is_told():
    given = (Category(1, "cat", -1), Category(2, "hound", -1))
    assert mmdet_categories(CONFIG, ("cat", "dog"), given=given) == (Category(1, "cat", 0), Category(2, "hound", 1))
    [note] = naming_notes(CONFIG, ("cat", "dog"), given)
    assert "the checkpoint names the classes otherwise" in note
    assert "label 1 is 'dog' there and 'hound' in the categories given" in note
    assert "the config names the classes otherwise" in naming_notes(NAMED, (), given)[0]
    assert "by their order; neither checkpoint nor config names any" in naming_notes(CONFIG, (), given)[0]
    stated = (Category(1, "cat", 0), Category(2, "hound", 1))
    assert naming_notes(CONFIG, ("cat", "dog"), stated) == ()


def test_names_that_are_not_the_checkpoints_are_told():
    categories = mmdet_categories(NAMED, ())
    assert "named by the config" in naming_notes(NAMED, (), categories)[0]
    bare = {"model": CONFIG["model"], "test_dataloader": {"dataset": {"type": "PetDataset"}}}
    categories = mmdet_categories(bare, (), of_dataset_type=("cat", "dog"))
    [note] = naming_notes(bare, (), categories, of_dataset_type=("cat", "dog"))
    assert "data set type PetDataset" in note
    assert naming_notes(NAMED, ("cat", "dog"), mmdet_categories(NAMED, ("cat", "dog"))) == ()


def test_cocos_own_classes_get_cocos_ids():
    """Ten of its 90 numbers were never used: the last of 80 classes is 90."""
    between = tuple(f"class {number}" for number in range(73))
    names = ("person", "bicycle", "car", "motorcycle", *between, "teddy bear", "hair drier", "toothbrush")
    ids = [one.id for one in mmdet_categories({"model": {}}, names)]
    assert (len(ids), ids[0], ids[10], ids[11], ids[-1]) == (80, 1, 11, 13, 90)


def test_weights_that_do_not_fit_say_where():
    with pytest.raises(CheckpointError, match=r"2 missing \(first: a\), 1 not the model's \(first: c\)"):
        require_fit(["a", "b"], ["c"], [], "x.pth")
    with pytest.raises(CheckpointError, match=r"1 of another shape \(first: d\)"):
        require_fit([], [], ["d"], "x.pth")
    require_fit([], [], [], "x.pth")
