"""One thread: the networks here are so small that a second one costs more than it brings.

It also keeps oneDNN from choosing other kernels for other batch sizes, which moves scores of random weights by 1.5e-5.
"""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
