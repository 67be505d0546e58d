"""What a release tells besides its weights: what loading needs, and nothing of its makers."""

from pathlib import Path

import pytest
import torch
from detserve.publish import publish
from detserve.published_metadata import as_texts, from_texts, scrub_metadata
from training_checkpoints import network, saved, trained

PRIVATE = ("/home/ann", "ann@example.org", "gpu7.example.org", "secret")


@pytest.fixture
def net():
    return network(1)


class TestWhatIsPrivate:
    """The original kept meta whole: configuration with paths, host names, seeds."""

    def test_nothing_private_is_in_the_file_and_each_removal_is_told(self, tmp_path, net):
        source = saved(tmp_path / "w.pth", trained(net))
        assert any(word.encode() in source.read_bytes() for word in PRIVATE)
        for name in ("released.pth", "released.safetensors"):
            found = publish(source, tmp_path / name)
            assert [word for word in PRIVATE if word.encode() in found.path.read_bytes()] == []
            assert {one.key for one in found.scrubbed} == {
                "meta.cfg",
                "meta.env_info",
                "meta.seed",
                "meta.experiment_name",
                "meta.hook_msgs",
                "meta.dataset_meta.ann_file",
            }

    @pytest.mark.parametrize(
        "value",
        [
            "/data",
            "/home/ann/a.json",
            "~ann/a",
            "~/a",
            "C:\\Users\\ann",
            "\\\\server\\share",
            "file:///a",
            "see /home/ann/a",
            "x='/home/ann'/",
            "ann@example.org",
            "by ann@gpu7",
            Path("a"),
        ],
        ids=str,
    )
    def test_values_that_betray(self, value):
        kept, removed = scrub_metadata({"classes": ("cat", value, "dog"), "epoch": value})
        assert kept == {}
        assert [one.key for one in removed] == ["meta.classes", "meta.epoch"]

    @pytest.mark.parametrize(
        "value",
        ["and/or", "tram / bus", "n/a", "/m/01g317", "3.3.0+cu121", "https://example.org/a/b", "a: b", "w/o mask", "@"],
    )
    def test_values_that_do_not(self, value):
        assert scrub_metadata({"classes": ("cat", value)}) == ({"classes": ("cat", value)}, [])

    def test_class_names_go_whole_for_without_one_they_would_name_others(self):
        kept, removed = scrub_metadata({"dataset_meta": {"classes": ["cat", "/home/ann", "dog"], "palette": [1]}})
        assert kept == {"dataset_meta": {"palette": [1]}}
        assert "path" in removed[0].reason

    def test_a_pickle_can_hold_what_contains_itself_or_is_no_text(self, tmp_path):
        names, table = ["cat"], {"a": 1}
        names.append(names)
        table["b"] = table
        meta = {"classes": names, "dataset_meta": {"palette": table}, "PALETTE": "\ud800", "epoch": 3}
        source = saved(tmp_path / "w.pth", {"meta": meta, "state_dict": {"a": torch.ones(2)}})
        for suffix in (".pth", ".safetensors"):
            found = publish(source, tmp_path / f"released{suffix}")
            assert {"meta.classes", "meta.PALETTE"} < {one.key for one in found.scrubbed}
            assert b"epoch" in found.path.read_bytes()

    def test_metadata_that_is_no_table(self):
        assert scrub_metadata(None) == ({}, [])
        kept, removed = scrub_metadata("/home/ann")
        assert (kept, [one.key for one in removed]) == ({}, ["meta"])
        assert scrub_metadata({"dataset_meta": "/home/ann"})[0] == {}

    def test_texts_of_safetensors_come_back(self):
        meta = {"dataset_meta": {"classes": ("cat", "dog")}, "mmdet_version": "3.0", "epoch": 3}
        assert from_texts(as_texts(meta)) == meta
        assert as_texts({"CLASSES": ("cat",)}) == {"format": "pt", "classes": '["cat"]'}
