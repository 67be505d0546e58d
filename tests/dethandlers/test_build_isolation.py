"""What is built reaches for nothing: files, connections, processes and pickles are refused, and only meanwhile."""

import pickle
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from dethandlers.build_isolation import IsolationError, isolated


class Reduced:
    def __reduce__(self):
        return print, ("unpickled",)


PICKLED = pickle.dumps(Reduced())


@pytest.mark.parametrize(
    "reach",
    [
        lambda _: socket.create_connection(("127.0.0.1", 9)),
        lambda _: subprocess.run([sys.executable, "-V"], check=True),
        lambda _: pickle.loads(PICKLED),
        lambda _: tempfile.mkdtemp(),
        lambda folder: (folder / "read").read_text(),
        lambda folder: (folder / "new").write_text(""),
        lambda folder: torch.load(folder / "read", weights_only=False),
    ],
)
def test_nothing_is_reached_meanwhile(reach, tmp_path, capsys):
    (tmp_path / "read").write_text("x")
    with pytest.raises(IsolationError, match="while a model is built"), isolated():
        reach(tmp_path)
    assert not (tmp_path / "new").exists()
    assert capsys.readouterr().out == ""
    assert (tmp_path / "read").read_text() == "x"


def test_packages_stay_open():
    with isolated():
        assert Path(torch.__file__).read_bytes()
        assert torch.nn.Linear(2, 3).weight.shape == (3, 2)


def test_other_threads_go_on(tmp_path):
    def write():
        (tmp_path / "a").write_text("a")

    with isolated():
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    assert (tmp_path / "a").read_text() == "a"
