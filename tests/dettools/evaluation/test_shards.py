"""`detserve evaluate --shard I/N` and `--merge`: the parts together are what one process says, to the last digit."""

import json
import shutil
import threading
from pathlib import Path

import pytest
from checkout import ROOT
from detserve.archive import build_archive
from detserve.spec import load_spec
from dettools.cli import main
from dettools.datasets.scenes import write_dataset
from dettools.evaluation.shards import Shard, ShardError, UnfinishedError

SHAPES = ROOT / "model_store" / "shapes" / "shapes.yaml"
COUNT, SHARDS = 7, 3


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_dataset(folder, count=COUNT, seed=5)
    return folder


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    archive = tmp_path_factory.mktemp("store") / "shapes.mar"
    build_archive(load_spec(SHAPES), folder=SHAPES.parent, out=archive)
    return archive


def evaluate(capsys, *arguments: object) -> tuple[int, dict]:
    code = main(["evaluate", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def of(scenes: Path) -> list:
    # One image at a time: a batch's rounding depends on which images share it, and a shard has other neighbours.
    return ["--images", scenes / "images", "--annotations", scenes / "annotations.json", "--batch-size", 1]


@pytest.fixture(scope="module")
def shards(shapes, scenes, tmp_path_factory) -> Path:
    """Three shards of the data set, with the other side of a certificate."""
    out = tmp_path_factory.mktemp("shards")
    for index in (2, 0, 1):
        where = [*map(str, of(scenes)), "--out", str(out), "--shard", f"{index}/{SHARDS}", "--against", "runtime"]
        assert main(["evaluate", str(shapes), *where]) == 0
    return out


def test_the_merged_figures_are_those_of_one_process(shapes, shards, scenes, tmp_path, capsys):
    whole_code, whole = evaluate(capsys, shapes, *of(scenes), "--out", tmp_path / "whole", "--against", "runtime")
    merged_code, merged = evaluate(
        capsys, shapes, "--annotations", scenes / "annotations.json", "--merge", shards, "--out", tmp_path / "merged"
    )

    mine_alone = {"seconds", "report", "results"}
    assert {key: value for key, value in merged.items() if key not in mine_alone} == {
        key: value for key, value in whole.items() if key not in mine_alone
    }
    assert (merged_code, merged["images"], merged["answered"]) == (whole_code, COUNT, COUNT) == (0, COUNT, COUNT)
    assert 0.5 < merged["metrics"]["bbox"]["figures"]["AP"] < 1
    for name in ("results.json", "certificate.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_shards_are_disjoint_and_together_everything():
    images = tuple(range(14))
    parts = [Shard(index, 4).of(images) for index in range(4)]
    assert sorted(sum(parts, ())) == list(images)
    assert [len(part) for part in parts] == [4, 4, 3, 3]


def test_a_broken_image_fails_its_shard_and_counts_in_the_whole(shapes, scenes, tmp_path, capsys):
    broken = tmp_path / "data"
    shutil.copytree(scenes, broken)
    first = json.loads((broken / "annotations.json").read_text())["images"][0]["file_name"]
    (broken / "images" / Path(first).name).write_bytes(b"no image")
    parts = [
        evaluate(capsys, shapes, *of(broken), "--out", tmp_path / "out", "--shard", f"{index}/2", "--limit", 5)
        for index in range(2)
    ]
    assert [code for code, _ in parts] == [1, 0]
    told = [(one["shard"], one["images"], one["answered"], one["failed"], "metrics" in one) for _, one in parts]
    assert told == [("0/2", 3, 2, 1, False), ("1/2", 2, 2, 0, False)]
    assert {path.name for path in (tmp_path / "out" / "shard-1-of-2").iterdir()} == {"answers.jsonl", "part.json"}
    code, merged = evaluate(capsys, shapes, "--annotations", broken / "annotations.json", "--merge", tmp_path / "out")
    assert code == 1
    assert (merged["images"], merged["failed"]) == (5, 1)
    assert merged["failed_images"][0]["image"] == first
    assert (tmp_path / "out" / "metrics.json").is_file()


@pytest.mark.parametrize("text", ["3", "8/8", "-1/8", "1/0", "a/b", "1/8/2", "١/8"])
def test_what_is_no_shard(text):
    with pytest.raises(ShardError, match="--shard: got"):
        Shard.parse(text)


def test_more_shards_than_images_are_refused_by_each(shapes, scenes, tmp_path, capsys):
    for index in (0, 7):
        assert (
            main(["evaluate", str(shapes), *map(str, of(scenes)), "--out", str(tmp_path), "--shard", f"{index}/8"]) == 2
        )
        assert "8 shards of 7 images" in capsys.readouterr().err


def _removed(folder: Path) -> None:
    (folder / "shard-1-of-3" / "part.json").unlink()


def _of_another_run(folder: Path) -> None:
    shutil.copytree(folder / "shard-1-of-3", folder / "shard-1-of-4")


def _with_other_options(folder: Path) -> None:
    path = folder / "shard-1-of-3" / "part.json"
    document = json.loads(path.read_text())
    document["limits"]["score_threshold"] = 0.01
    path.write_text(json.dumps(document))


def _of_other_weights(folder: Path) -> None:
    path = folder / "shard-2-of-3" / "answers.jsonl"
    path.write_text(path.read_text().replace('"answerer": "', '"answerer": "other ', 1))


def _cut_off(folder: Path) -> None:
    path = folder / "shard-2-of-3" / "answers.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:2]) + "\n")


def _twice(folder: Path) -> None:
    shutil.copyfile(folder / "shard-0-of-3" / "answers.jsonl", folder / "shard-2-of-3" / "answers.jsonl")


def _damaged(folder: Path) -> None:
    (folder / "shard-2-of-3" / "part.json").write_text("{}")


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_removed, "of 3 shards 2 are done; run --shard 1/3"),
        (_of_another_run, "shards of different runs \\(of 3 and of 4\\)"),
        (_with_other_options, "part.json's limits"),
        (_of_other_weights, "answers.jsonl's identity"),
        (_cut_off, "in no shard's answers"),
        (_twice, "answered in two shards"),
        (_damaged, "no part of an evaluation"),
        (_emptied, "expected a folder with shard-I-of-N/"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_parts_that_are_not_one_evaluation_are_refused(spoil, said, shards, scenes, tmp_path):
    from dettools.evaluation.run import merge

    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    spoil(folder)
    with pytest.raises(ShardError, match=said):
        merge(folder, scenes / "annotations.json")


def test_a_merge_waits_for_the_last_shard(shards, scenes, tmp_path):
    from dettools.evaluation.run import merge

    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    part = folder / "shard-1-of-3" / "part.json"
    late = part.rename(tmp_path / "part.json")
    with pytest.raises(UnfinishedError):
        merge(folder, scenes / "annotations.json", wait_s=0)
    timer = threading.Timer(0.5, lambda: late.rename(part))
    timer.start()
    assert len(merge(folder, scenes / "annotations.json", wait_s=60).answers) == COUNT
    timer.join()


def test_a_merge_waits_for_shards_that_have_not_begun(shards, scenes, tmp_path):
    """As in k8s/evaluate-job, where its pod starts beside theirs and exit code 2 would be the Job's end."""
    from dettools.evaluation.run import merge

    folder = tmp_path / "shards"
    with pytest.raises(UnfinishedError):
        merge(folder, scenes / "annotations.json", wait_s=0)
    timer = threading.Timer(0.5, lambda: shutil.copytree(shards, tmp_path / "new").rename(folder))
    timer.start()
    assert len(merge(folder, scenes / "annotations.json", wait_s=60).answers) == COUNT
    timer.join()


def test_other_annotations_are_refused(shards, scenes, tmp_path, capsys):
    document = json.loads((scenes / "annotations.json").read_text())
    document["annotations"].pop()
    (tmp_path / "other.json").write_text(json.dumps(document))
    assert main(["evaluate", "shapes", "--annotations", str(tmp_path / "other.json"), "--merge", str(shards)]) == 2
    assert "evaluated on another file" in capsys.readouterr().err
