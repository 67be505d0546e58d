"""A token's time is over under load, and clocks that do not agree: no request fails."""

import json
import time

import pytest
from detserve import server
from detserve.client import Client
from fault_load import answers_of, asking, tell


@pytest.fixture(scope="module")
def instance(run, squares):
    return run("expiry", squares, token_minutes=0.05)


@pytest.mark.server
def test_expiries_under_load_fail_no_request(instance, square_pictures):
    with Client.for_instance("expiry") as client:
        expected = answers_of(client, "squares", square_pictures)
    tokens = {server.token(instance, renew=False).value}

    with asking(lambda: Client.for_instance("expiry"), "squares", expected, clients=8) as load:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            tokens.add(server.token(instance, renew=False).value)
            time.sleep(0.1)
        figures = load.figures()
    tell(f"8 clients over {len(tokens) - 1} renewals: {figures}")
    assert len(tokens) >= 3
    assert (figures.lost, figures.wrong) == ({}, 0)
    assert figures.answered == figures.sent


@pytest.mark.server
def test_a_clock_that_jumped_fails_no_request(instance, square_pictures):
    """The token's time is over for the server, while to whoever reads the key file it has years left."""
    with Client.for_instance("expiry") as client:
        expected = answers_of(client, "squares", square_pictures)
    keys = json.loads(instance.key_path.read_text())
    for kind in ("inference", "management"):
        keys[kind]["expiration time"] = "2100-01-01T00:00:00.000000000Z"
    instance.key_path.write_text(json.dumps(keys))
    old = server.token(instance).value
    time.sleep(3.2)
    assert server.token(instance).value == old

    with asking(lambda: Client.for_instance("expiry"), "squares", expected, clients=8, most=20) as load:
        figures = load.figures(all_of_them=True)
    tell(f"8 clients after a clock's jump: {figures}")
    assert server.token(instance, renew=False).value != old
    assert (figures.sent, figures.answered, figures.lost, figures.wrong) == (160, 160, {}, 0)
