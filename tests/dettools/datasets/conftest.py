"""The conversion command, as its tests call it."""

import json

import pytest
from dettools import cli


@pytest.fixture
def convert(capsys):
    """Run the command; return its report, or what it says when it refuses."""

    def run(*words, code: int = 0):
        assert cli.main(["convert-dataset", *map(str, words), "--json"]) == code
        out, err = capsys.readouterr()
        return json.loads(out.splitlines()[-1]) if code < 2 else err

    return run
