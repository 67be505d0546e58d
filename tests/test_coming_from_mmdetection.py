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


def originals(page: str) -> list[str]:
    """MMDetection's own commands: the blocks marked `shell`."""
    return re.findall(r"^```shell\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=["en", "zh"])
def test_under_every_command_of_the_original_stands_ours(page):
    _, *rest = re.split(r"^```shell\n", page, flags=re.MULTILINE)
    assert len(rest) >= 6
    for block in rest:
        own, separator, below = block.partition("```\n")
        assert separator
        assert "```bash\n" in below.partition("\n## ")[0], f"nothing of ours stands under: {own}"


@pytest.mark.shared_data
@pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=["en", "zh"])
def test_the_commands_of_the_original_document_stand_here_word_for_word(page, shared_data):
    document = shared_data.parent / "reference" / "useful-tools.zh.md"
    if not document.is_file():
        pytest.skip("the original document is not beside this checkout")
    section = re.search(r"^## 模型服务部署\n(.*?)^## ", document.read_text("utf-8"), re.DOTALL | re.MULTILINE)[1]
    # Its example names files of MMDetection's checkout; the same command stands above it in its general form.
    commands = [block for block in originals(section) if "demo/demo.jpg" not in block]
    assert len(commands) >= 6
    assert originals(page) == commands


def test_links_to_files_lead_somewhere():
    for page in (ENGLISH, CHINESE):
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", BLOCK.sub("", page))
        assert links
        assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.timeout(1500)
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
    assert len(got) > len(told) == 3
    for expected, found in zip(told, got[: len(told)], strict=True):
        assert (found["class_label"], found["class_name"]) == (expected["class_label"], expected["class_name"])
        assert found["bbox"] == pytest.approx(expected["bbox"], abs=0.1)
        assert found["score"] == pytest.approx(expected["score"], abs=1e-3)
    assert (tmp_path / "work-dir").is_dir()
    assert len(blocks(ENGLISH)) > 10
