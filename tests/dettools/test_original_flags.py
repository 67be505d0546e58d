"""Every positional and flag of the original scripts is taken: it works, or the help says what it does here.

One file for each command in original_flags/: ``COMMAND``, ``BASE`` (its positionals) and ``FLAGS``, rows of the
words on the command line and "works" or the words of the help that say what comes instead.
"""

import runpy
from pathlib import Path

import pytest
from dettools import cli

FOLDER = Path(__file__).parent / "original_flags"


def rows():
    for path in sorted(FOLDER.glob("*.py")):
        table = runpy.run_path(str(path))
        for words, outcome in table["FLAGS"]:
            yield pytest.param(
                table["COMMAND"].split(), table["BASE"], words, outcome, id=f"{path.stem} {' '.join(words)}"
            )


@pytest.mark.parametrize(("command", "base", "words", "outcome"), list(rows()))
def test_a_flag_of_the_original_is_taken(command, base, words, outcome, capsys):
    args = cli.build_parser().parse_args([*command, *base, *words])
    assert callable(args.run)
    if outcome != "works":
        with pytest.raises(SystemExit):
            cli.main([*command, "--help"])
        assert " ".join(outcome.split()) in " ".join(capsys.readouterr().out.split())


def test_a_flag_that_nobody_knows_is_refused():
    with pytest.raises(SystemExit):
        cli.build_parser().parse_args(["optimize-anchors", "config.py", "--frobnicate"])
