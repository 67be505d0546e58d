"""Clients that send slowly, stop in the middle, or close half of their connection: the others do not notice."""

import socket
import threading
import time
from urllib.parse import urlsplit

import psutil
import pytest
from detserve import server
from detserve.client import Client
from fault_load import answers_of, asking, tell


def head_of(instance, model: str, length: int) -> bytes:
    return (
        f"POST /predictions/{model} HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\n"
        f"Authorization: Bearer {server.token(instance).value}\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def connected(instance) -> socket.socket:
    parts = urlsplit(instance.require_running().inference_url)
    return socket.create_connection((parts.hostname, parts.port), timeout=30)


@pytest.fixture(scope="module")
def instance(run, squares):
    return run("slow", squares)


@pytest.mark.server
def test_slow_and_half_closed_clients_do_not_disturb_the_others(instance, square_pictures):
    with Client.for_instance("slow") as client:
        expected = answers_of(client, "squares", square_pictures)
    before = {process.pid for process in instance.processes()}
    image = square_pictures[0]
    head = head_of(instance, "squares", len(image))
    stop = threading.Event()

    def drip(one: socket.socket) -> None:
        """A byte now and then, and never the last."""
        one.sendall(head)
        for byte in image[:-1]:
            if stop.wait(0.1):
                return
            one.sendall(bytes([byte]))

    dripping = [connected(instance) for _ in range(100)]
    threads = [threading.Thread(target=drip, args=(one,)) for one in dripping]
    for thread in threads:
        thread.start()
    half_closed = [connected(instance) for _ in range(20)]
    try:
        with asking(lambda: Client.for_instance("slow"), "squares", expected, clients=4) as load:
            load.wait_for(20)
            for number, one in enumerate(half_closed):
                # Half of them have sent all, the others half of their image: then nothing more comes from them.
                one.sendall(head + (image if number % 2 else image[: len(image) // 2]))
                one.shutdown(socket.SHUT_WR)
            load.wait_for(200)
            figures = load.figures()
        # Whoever closes a half gets an answer or the end of the connection, not silence.
        answers = []
        for one in half_closed:
            one.settimeout(10)
            try:
                answers.append(one.recv(20)[9:12])
            except ConnectionError:
                answers.append(b"")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        for one in dripping + half_closed:
            one.close()
    tell(f"4 clients beside 100 slow and 20 half-closed ones: {figures}; half-closed: {sorted(set(answers))}")
    assert (figures.lost, figures.wrong) == ({}, 0)
    assert figures.answered == figures.sent >= 220
    assert set(answers) <= {b"200", b"400", b"408", b""}
    assert {process.pid for process in instance.processes()} == before
    # And what the slow ones held is given back.
    frontend = psutil.Process(instance.require_running().pid)
    deadline = time.monotonic() + 20
    while left := [one for one in frontend.net_connections("inet") if one.status == psutil.CONN_CLOSE_WAIT]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.mark.server
def test_clients_that_leave_before_their_answer(instance, square_pictures):
    with Client.for_instance("slow") as client:
        expected = answers_of(client, "squares", square_pictures)
    image = square_pictures[0]
    head = head_of(instance, "squares", len(image))

    with asking(lambda: Client.for_instance("slow"), "squares", expected, clients=4) as load:
        for number in range(300):
            one = connected(instance)
            one.sendall(head + image[: len(image) if number % 3 else 100])
            if number % 2:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, no goodbye
            one.close()
        load.wait_for(50)
        figures = load.figures()
    tell(f"4 clients beside 300 that leave: {figures}")
    assert (figures.lost, figures.wrong) == ({}, 0)
    assert figures.answered == figures.sent
