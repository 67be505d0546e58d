"""The monitor's process: ``python -m detserve.monitor FOLDER HOST PORT``, started by `serve start`.

It lives as long as the server whose state stands in the folder, and a little longer: who asks hears no, then nothing.
"""

import logging
import sys
import threading
import time
from pathlib import Path

from detserve.instance import Instance
from detserve.monitor.endpoint import Endpoint
from detserve.monitor.observer import Observer

_TICK_S = 1.0
_LINGER_S = 3.0


def main(arguments: list[str]) -> int:
    """Watch a server until it is gone."""
    folder, host, port = Path(arguments[0]), arguments[1], int(arguments[2])
    logging.basicConfig(format="%(asctime)s [%(levelname)s] %(message)s", level=logging.WARNING)
    instance = Instance(folder.name, folder)
    state = instance.read()
    if state is None:
        return 0
    observer = Observer(instance, state)
    endpoint: Endpoint | None = None
    gone_since: float | None = None
    while gone_since is None or time.monotonic() - gone_since < _LINGER_S:
        begun = time.monotonic()
        if endpoint is None:
            endpoint = _listening(host, port, observer)
        if observer.is_there():
            observer.tick()
        elif gone_since is None:
            gone_since = begun
        time.sleep(max(0.05, _TICK_S - (time.monotonic() - begun)))
    return 0


def _listening(host: str, port: int, observer: Observer) -> Endpoint | None:
    """Return the endpoint; None when the address is taken, to be tried again: the last monitor may still linger."""
    try:
        endpoint = Endpoint(host, port, observer)
    except OSError as error:
        logging.getLogger("detserve.monitor").warning("cannot listen on %s:%d: %s", host, port, error)
        return None
    threading.Thread(target=endpoint.serve_forever, name="endpoint", daemon=True).start()
    return endpoint


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
