"""Questions to a server that has just started, so that its first users do not pay for it.

The frontend's code runs interpreted until it has been used some thousand times: at 25 requests a second on two cores,
the way through it took 6 ms at first and 2.5 ms then (benchmarks/README.md). The questions are of the kind that a
worker answers without its network: what it is. They go the way of every prediction, with a body of a photograph's size.
"""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from detserve.async_client import AsyncClient, Target
from detserve.instance import InstanceState

_AT_ONCE = 4
_BODY_BYTES = 100_000


def warm_up(state: InstanceState, token: str | None, models: Sequence[str], seconds: float) -> int:
    """Ask for ``seconds`` what the models are; return how many answers came.

    Args:
        models: names of models whose worker describes itself.
    """
    if not models or seconds <= 0:
        return 0
    # In a thread of its own: the caller may have an event loop already.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, _ask(state, token, models, seconds)).result()


async def _ask(state: InstanceState, token: str | None, models: Sequence[str], seconds: float) -> int:
    counts = []
    body = bytes(min(_BODY_BYTES, state.max_request_bytes // 2))
    for model in models:
        target = Target(state.backend_url, f"/predictions/{model}", headers={"describe": "True"}, token=token)
        end = time.monotonic() + seconds / len(models)
        async with AsyncClient(target, timeout_s=10.0) as client:
            counts += await asyncio.gather(*(_keep_asking(client, body, end) for _ in range(_AT_ONCE)))
    return sum(counts)


async def _keep_asking(client: AsyncClient, body: bytes, end: float) -> int:
    count = 0
    while time.monotonic() < end:
        reply = await client.send(body)
        if reply.error:
            # It is a courtesy: whatever is wrong will be told to whoever asks in earnest.
            break
        count += 1
    return count
