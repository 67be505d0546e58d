"""Ten times more clients than the server can serve: it says so, they wait, and in the end all are served."""

import collections
import threading

import pytest
import requests
from detserve import server
from detserve.client import Client
from fault_load import asking, tell
from throwaway import build

# A handler that takes 20 ms an image, with places for four images in the queue and one at work: 40 to 60 clients are
# ten times too many for it.
SLOW = """
import time

class Slow:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        time.sleep(0.02 * len(data))
        return [self.answer(bytes(row["body"])[0]) for row in data]

    def answer(self, value):
        return [{"class_label": 1, "class_name": "cat", "bbox": [0, 1, 2, value], "score": 0.5}]
"""


@pytest.mark.server
def test_ten_times_too_many_clients_are_all_served(run, tmp_path):
    instance = run("overload", build(tmp_path, "slow", source=SLOW), job_queue_size=4)
    expected = {
        bytes([value]): [{"class_label": 1, "class_name": "cat", "bbox": [0, 1, 2, value], "score": 0.5}]
        for value in range(7)
    }

    # What the server says to those that it cannot serve.
    url = f"{instance.require_running().inference_url}/predictions/slow"
    headers = {"Authorization": f"Bearer {server.token(instance).value}"}
    said: collections.Counter[int] = collections.Counter()

    def once() -> None:
        said[requests.post(url, data=b"\\1", headers=headers, timeout=30).status_code] += 1

    threads = [threading.Thread(target=once) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(said) == {200, 503}

    def patient() -> Client:
        return Client.for_instance("overload", retries=60, timeout_s=60)

    with asking(patient, "slow", expected, clients=50, most=4) as load:
        figures = load.figures(all_of_them=True)
    tell(f"50 clients at places for 5: without retries {dict(said)}; with retries {figures}")
    assert (figures.sent, figures.answered, figures.lost, figures.wrong) == (200, 200, {}, 0)
    assert figures.retried > 0
