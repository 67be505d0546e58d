"""The walk through MMDetection's document runs word for word, in English and Chinese alike."""

import importlib.util
import json
import re
import shutil

import pytest
from checkout import ROOT
from documented_commands import BLOCK, blocks, run_commands

ENGLISH = (ROOT / "docs" / "coming-from-mmdetection.md").read_text("utf-8")
CHINESE = (ROOT / "docs" / "coming-from-mmdetection.zh.md").read_text("utf-8")


def fenced(page: str) -> list[str]:
    return re.findall(r"(?:<!-- not run: [^>]+ -->\n)?```\w+\n.*?```", page, re.DOTALL)


def test_both_languages_have_the_same_commands_and_answers():
    assert fenced(ENGLISH) == fenced(CHINESE)
    assert [line.count("|") for line in ENGLISH.splitlines() if line.startswith("|")] == [
        line.count("|") for line in CHINESE.splitlines() if line.startswith("|")
    ]
    assert len(re.findall("^#+ ", ENGLISH, re.MULTILINE)) == len(re.findall("^#+ ", CHINESE, re.MULTILINE))


def test_every_step_of_the_original_document_has_its_command():
    """What the original says to type stands in the page, whitespace aside, before what is typed here."""
    for original in (
        "python tools/deployment/mmdet2torchserve.py ${CONFIG_FILE} ${CHECKPOINT_FILE} \\",
        "torchserve --start --ncs \\",
        "curl http://127.0.0.1:8080/predictions/${MODEL_NAME} -T 3dogs.jpg",
        "python tools/deployment/test_torchserver.py ${IMAGE_FILE} ${CONFIG_FILE} ${CHECKPOINT_FILE} ${MODEL_NAME}",
        "torchserve --stop",
    ):
        assert original in ENGLISH
        assert "```bash" in ENGLISH[ENGLISH.index(original) :] or original.startswith("curl")


def test_links_to_files_lead_somewhere():
    for page in (ENGLISH, CHINESE):
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", BLOCK.sub("", page))
        assert links
        assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.skipif(shutil.which("curl") is None, reason="the page calls curl, which is not installed")
@pytest.mark.skipif(importlib.util.find_spec("mmdet") is None, reason="MMDetection is not installed (detserve[mmdet])")
def test_the_commands_run(shared_data, tmp_path):
    model = shared_data / "models" / "mmdet_yolox_nano"
    for path in (*model.glob("*.py"), *model.glob("*.pth"), shared_data / "photos" / "3dogs.jpg"):
        shutil.copy(path, tmp_path)

    answer = run_commands(ENGLISH, tmp_path)

    assert answer.returncode == 0, f"{answer.stdout[-3000:]}\n{answer.stderr[-3000:]}"
    told = json.loads(re.search(r"```json\n(.*?)```", ENGLISH, re.DOTALL)[1])
    # curl's answers end without a newline.
    got, _ = json.JSONDecoder().raw_decode(answer.stdout[answer.stdout.index('[{"class_label"') :])
    for expected, found in zip(told, got, strict=False):
        assert (found["class_label"], found["class_name"]) == (expected["class_label"], expected["class_name"])
        assert found["bbox"] == pytest.approx(expected["bbox"], abs=0.1)
        assert found["score"] == pytest.approx(expected["score"], abs=1e-3)
    assert (tmp_path / "work-dir").is_dir()
    assert len(blocks(ENGLISH)) > 10
