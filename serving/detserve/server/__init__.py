"""The running TorchServe: the only place that knows how it is configured, started, watched and ended.

    launch.start ─► archives (what is in a .mar) ─► settings (config.properties, log4j2.xml) ─► processes (java)
    status.status ◄── management (REST API) ◄── tokens (key_file.json)
    stop.stop     ─► drain ─► SIGTERM ─► every process gone ─► files of the run gone, logs stay
    lifecycle       models in and out while it runs ─► admission (checked copies) ─► management; lull (until quiet)
    worker_log      what a worker said before it died; which workers are busy

Written for TorchServe 0.12; a successor to it replaces this folder. The facts of a running server live in
`detserve.instance`.
"""

from detserve.instance import Instance, InstanceState, Ports, ServedModel, instances
from detserve.server.admission import stored_archive
from detserve.server.failures import NotStartedError
from detserve.server.java import Java, find_java
from detserve.server.launch import start
from detserve.server.lifecycle import Unregistered, register, scale, set_default, unregister
from detserve.server.logs import LOGS, log_path, logs
from detserve.server.management import Management
from detserve.server.processes import holder, require_free
from detserve.server.serving_wish import ServingWish
from detserve.server.settings import ServerSettings, free_ports, ports_from
from detserve.server.status import ModelStatus, ServerStatus, WorkerStatus, status
from detserve.server.stop import StopReport, stop
from detserve.server.token_source import token_source
from detserve.server.tokens import Token, token

__all__ = [
    "LOGS",
    "Instance",
    "InstanceState",
    "Java",
    "Management",
    "ModelStatus",
    "NotStartedError",
    "Ports",
    "ServedModel",
    "ServerSettings",
    "ServerStatus",
    "ServingWish",
    "StopReport",
    "Token",
    "Unregistered",
    "WorkerStatus",
    "find_java",
    "free_ports",
    "holder",
    "instances",
    "log_path",
    "logs",
    "ports_from",
    "register",
    "require_free",
    "scale",
    "set_default",
    "start",
    "status",
    "stop",
    "stored_archive",
    "token",
    "token_source",
    "unregister",
]
