"""nginx before TorchServe: what may be asked, by whom, how much at once, and what the answer is otherwise.

    settings (what a user chooses) ─► configuration (EdgePlan ─► nginx.conf) ─► nginx (the process)
    process   the edge of one instance, from its server's start to its end ─► keeper (its own process) ─► nginx
    front     one nginx before the edges of several instances
    tokens    the lines of a file, as files that nginx looks for

TorchServe lets a client kill a worker, runs inference on GET and DELETE, and cuts off requests when it ends; behind the
edge nobody but this machine reaches it.
"""

from detserve.edge.settings import EdgeSettings

__all__ = ["EdgeSettings"]
