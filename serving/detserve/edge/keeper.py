"""The process that keeps an instance's edge: nginx's parent, from the server's start to its end.

    tokens file ─► tokens folder        TorchServe's key file, certificate ─► nginx.conf ─► reload
    nginx died ─► started again         TorchServe's frontend gone, SIGTERM ─► nginx ended
    log too long ─► rolled

Run as ``python -m detserve.edge.keeper FOLDER``, where FOLDER holds ``plan.json``. It imports little: it stays as long
as the server.
"""

import logging
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from detserve.edge.configuration import EdgePlan, read_plan
from detserve.edge.nginx import configure, end_nginx, leave_to_finish, roll_logs, start_nginx
from detserve.edge.tokens import backend_token, publish_tokens
from detserve.errors import ServerError
from detserve.instance import Instance, is_alive

if TYPE_CHECKING:
    import subprocess

_POLL_S = 0.2
_GRACE_S = 5.0

log = logging.getLogger("detserve.edge")


class Keeper:
    """Keeps one edge.

    Args:
        instance: whose server is behind it; the edge ends with that server.
    """

    def __init__(self, instance: Instance, plan: EdgePlan) -> None:
        self.instance = instance
        self.plan = plan
        self._folder = Path(plan.folder)
        self._ended = False
        self._nginx: subprocess.Popen[bytes] | None = None
        # Not as it is now: it may have changed since the folder was brought up to it.
        self._tokens_seen: object = None
        self._files_seen = self._stamps()
        self._restarts = 0

    def run(self) -> None:
        """Stay until the server ends, or SIGTERM."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        self._nginx = start_nginx(self._folder)
        try:
            while not self._ended and self._server_lives():
                try:
                    self._look()
                except (ServerError, OSError) as error:
                    log.warning("%s", error)
                    time.sleep(1.0)
                time.sleep(_POLL_S)
        finally:
            end_nginx(self._nginx, grace_s=_GRACE_S)

    def _end(self, _number: int, _frame: FrameType | None) -> None:
        self._ended = True

    def _server_lives(self) -> bool:
        state = self.instance.read()
        return state is not None and is_alive(state)

    def _look(self) -> None:
        if self._nginx is None or self._nginx.poll() is not None:
            self._start_again()
        self.follow_tokens()
        stamps = self._stamps()
        if stamps != self._files_seen:
            if self.plan.backend_token is not None:
                self.plan = replace(self.plan, backend_token=backend_token(self.instance))
            configure(self.plan)
            self._files_seen = stamps
            self._signal(signal.SIGHUP)
            log.warning("nginx was told of a new certificate or server token")
        self._roll()

    def follow_tokens(self) -> None:
        """Bring what nginx looks into up to the token file when that is not as it was last read."""
        stamp = _stamp(self.plan.tokens_file)
        if stamp == self._tokens_seen or not self.plan.tokens_file or not self.plan.tokens_folder:
            return
        if publish_tokens(Path(self.plan.tokens_file), Path(self.plan.tokens_folder)):
            log.warning("the tokens were read again")
        self._tokens_seen = stamp

    def _start_again(self) -> None:
        """A master that was killed leaves its workers: they answer what they have in hand, and give up the port."""
        self._restarts += 1
        log.warning("nginx ended and is started again (%d times by now)", self._restarts)
        leave_to_finish(self.plan)
        self._nginx = start_nginx(self._folder)

    def _signal(self, number: signal.Signals) -> None:
        if self._nginx is not None and self._nginx.poll() is None:
            self._nginx.send_signal(number)

    def _stamps(self) -> tuple[object, ...]:
        watched = [self.plan.tls_certificate, self.plan.tls_key]
        if self.plan.backend_token is not None:
            watched.append(str(self.instance.key_path))
        return tuple(_stamp(path) for path in watched)

    def _roll(self) -> None:
        if roll_logs(self.plan):
            self._signal(signal.SIGUSR1)
            # What is said here stands between nginx's own lines.
            with Path(self.plan.error_log).open("ab") as file:
                for stream in (sys.stdout, sys.stderr):
                    os.dup2(file.fileno(), stream.fileno())


def _stamp(path: str | None) -> object:
    """Return what changes with a file's content; Kubernetes changes a link above it, and so the file's number."""
    if path is None:
        return None
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def main() -> None:
    """Keep the edge whose folder is the first argument; the instance is the folder above it."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    folder = Path(sys.argv[1])
    instance = Instance(folder.parent.name, folder.parent)
    Keeper(instance, read_plan(folder)).run()


if __name__ == "__main__":
    main()
