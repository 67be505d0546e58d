"""What a running server serves, changed: versions in, out, more or fewer workers, another default.

    register    ─► admission ─► TorchServe loads it ─► every worker READY and one has answered ─► state.json
                   a worker dies, time is over, Ctrl-C ─► unregistered, its file gone, its own error raised
    unregister  ─► wait until it is quiet ─► no workers ─► queue still empty? ─► unregistered, file gone, state.json

What TorchServe 0.12 does by itself (tried, and kept in the tests): it changes the default without a failed request; a
worker that is taken away cuts its request off with a 500 "Worker died", which clients send again; a version that is
unregistered leaves what is in its queue **without any answer**; a registration whose worker does not start stays
registered and is tried again for five minutes.

Changes are made one after the other, whoever asks. They do not hold the instance: a `serve stop`, or the SIGTERM of a
container, ends the server whatever is being changed.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from detserve.errors import ServerError
from detserve.instance import Instance, InstanceState, ServedModel, is_alive
from detserve.server.admission import admitted, stored_archive
from detserve.server.archives import ModelSettings
from detserve.server.failures import NotStartedError, worker_died
from detserve.server.lull import await_lull, drain_version
from detserve.server.management import Description, Management, NotServedError
from detserve.server.serving_wish import LEFT_OPEN, ServingWish
from detserve.server.tokens import NotAnsweringError
from detserve.server.worker_log import StartupWatch, WorkerFailure

_POLL_S = 0.05
_LOCK_WAIT_S = 10.0


@dataclass(frozen=True)
class Unregistered:
    """A version that is no longer served.

    Attributes:
        drained: whether it was quiet and its queue empty when it was taken away; False only when forced.
        seconds: that it took.
    """

    name: str
    version: str
    drained: bool
    seconds: float


def register(
    archive: Path,
    *,
    instance: Instance | None = None,
    wish: ServingWish | None = None,
    trusted_keys: Sequence[Path] | None = None,
    foreign: bool = False,
    timeout_s: float = 180.0,
    on_progress: Callable[[str], None] = lambda _: None,
) -> ServedModel:
    """Serve one more model, or one more version of a model; return when every worker of it has answered.

    The first version of a model is its default, a later one is not. Its workers are those of the wish, else those of
    the version that is the default now (the load will be the same), else the archive's, else what suits the machine;
    an archive's own batch size goes before the default version's.

    Args:
        trusted_keys: as for `check_archive`; the server's own (``serve start --require-signature``) hold in any case.
        foreign: take an archive that was not built by detserve.

    Raises:
        ArchiveError: the archive must not be served.
        ServerError: it does not start, with its worker's own words; it is not registered then.
    """
    instance, wish = instance or Instance.named(), wish or ServingWish()
    with _changing(instance) as (state, management):
        on_progress(f"checking {archive.name}")
        # The server's own keys go first: who asks cannot bring one in.
        keys = trusted_keys if state.trusted_keys is None else [Path(path) for path in state.trusted_keys]
        with admitted(archive, instance, LEFT_OPEN, trusted_keys=keys, foreign=foreign) as (facts, place):
            name, version = facts.name, facts.version
            served = _versions(management, name)
            if version in {str(one["modelVersion"]) for one in served}:
                raise ServerError(
                    f"Model {name!r} {version} is served already. Give the new one another version in its spec and "
                    f"build it again, or unregister the old one: detserve models unregister {name} {version}."
                )
            if state.open_inference and not facts.open_inference:
                raise ServerError(
                    f"{archive} was not built by this detserve, and its worker would die of a ModelInfer that the "
                    "server admits. Build the archive again, or start a server with it: that one leaves the Open "
                    "Inference Protocol out."
                )
            place()
        current = ModelSettings.from_torchserve(management.describe(name)) if served else None
        settings = wish.settled(facts.settings, current)
        model = ServedModel(name, version, str(archive.resolve()), not served, settings.min_workers)
        watch = _fresh_watch(instance)
        try:
            management.register(stored_archive(instance, name, version).name, settings)
            on_progress(f"loading {name} {version}")
            _wait_until_it_answers(management, instance, state, model, watch, timeout_s)
            _record(instance, state, lambda models: (*models, model))
        except BaseException:
            with contextlib.suppress(ServerError):
                management.unregister(name, version)
            stored_archive(instance, name, version).unlink(missing_ok=True)
            raise
    return model


def scale(
    name: str,
    min_workers: int,
    max_workers: int | None = None,
    *,
    version: str | None = None,
    instance: Instance | None = None,
    timeout_s: float = 180.0,
    on_progress: Callable[[str], None] = lambda _: None,
) -> ServedModel:
    """Give a version more or fewer workers; return when it has them and one has answered.

    TorchServe keeps the number between the two and never changes it by itself. A worker that goes is taken when it has
    nothing in hand; where it is not idle within two seconds its request is cut off with a 500 that clients send again.

    Args:
        version: the default one without.
        max_workers: ``min_workers`` without.

    Raises:
        ServerError: a worker does not start; then the number is what it was before.
    """
    instance = instance or Instance.named()
    most = max(min_workers, min_workers if max_workers is None else max_workers)
    if min_workers < 1 or (max_workers is not None and max_workers < min_workers):
        raise ServerError(
            f"Got --min {min_workers} --max {max_workers}; expected 1 or more, and no maximum below the minimum. To "
            "take a model out use `detserve models unregister`."
        )
    with _changing(instance) as (state, management):
        before = _require_served(management, name, version)
        version = str(before["modelVersion"])
        leaving = {str(worker["id"]) for worker in before["workers"][most:]}
        if leaving:
            on_progress(f"waiting until {len(leaving)} worker(s) have nothing in hand")
            await_lull(instance, name, version, leaving)
        # Where none is added, those that end are the ones that were taken away.
        watch = _fresh_watch(instance) if len(before["workers"]) < min_workers else None
        management.scale(name, version, min_workers, most)
        known = {(model.name, model.version): model for model in state.models}.get((name, version))
        archive = known.archive if known else str(before["modelUrl"])
        is_default = known.default if known else False
        model = ServedModel(name, version, archive, is_default, min_workers)
        count = len(before["workers"])
        on_progress(f"{name} {version}: {count} → {min(max(count, min_workers), most)} worker(s)")
        try:
            _wait_until_it_answers(management, instance, state, model, watch, timeout_s)
        except BaseException:
            with contextlib.suppress(ServerError):
                management.scale(name, version, before["minWorkers"], before["maxWorkers"])
            raise
        _record(instance, state, lambda models: tuple(model if _same(one, model) else one for one in models))
    return model


def set_default(name: str, version: str, *, instance: Instance | None = None) -> str | None:
    """Let requests that name no version go to this one; return which it was before.

    No request fails: those in a queue are answered by the version that they came to.

    Raises:
        ServerError: the version is not served, or not all of its workers are ready.
    """
    instance = instance or Instance.named()
    with _changing(instance) as (state, management):
        wanted = _require_served(management, name, version)
        if not wanted["workers"] or any(worker["status"] != "READY" for worker in wanted["workers"]):
            raise ServerError(
                f"Model {name!r} {version} has no worker that is ready, so it does not become the default. See "
                "`detserve serve status` and `detserve serve logs`."
            )
        before = str(management.describe(name)["modelVersion"])
        management.set_default(name, version)
        _record(
            instance,
            state,
            lambda models: tuple(
                replace(one, default=one.version == version) if one.name == name else one for one in models
            ),
        )
    return before


def unregister(
    name: str,
    version: str | None = None,
    *,
    instance: Instance | None = None,
    drain_timeout_s: float = 30.0,
    force: bool = False,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Unregistered:
    """Take a version out when no request is in its queue or in its workers' hands.

    Args:
        version: may be left out when the model has one.
        force: take it out when ``drain_timeout_s`` is over, whoever still asks for it: those in its queue are never
            answered.

    Raises:
        ServerError: it is not served, it is the default of several versions, or it is still being asked; it
            is served as before then.
    """
    instance = instance or Instance.named()
    began = time.monotonic()
    with _changing(instance) as (state, management):
        versions = [str(one["modelVersion"]) for one in _versions(management, name)]
        described = _require_served(management, name, version)
        if version is None and len(versions) > 1:
            raise ServerError(f"Model {name!r} is served in the versions {', '.join(versions)}; say which one goes.")
        version = str(described["modelVersion"])
        if len(versions) > 1 and str(management.describe(name)["modelVersion"]) == version:
            others = ", ".join(one for one in versions if one != version)
            raise ServerError(
                f"Model {name!r} {version} is the default version and does not go before another one is: detserve "
                f"models set-default {name} VERSION (there are: {others})."
            )
        on_progress(f"waiting for the requests of {name} {version}")
        drained = drain_version(management, instance, state, described, began + drain_timeout_s)
        if not drained and not force:
            raise ServerError(
                f"Model {name!r} {version} is still being asked after {drain_timeout_s:g} s, so it stays. End the "
                "requests that name this version, or give it longer with --drain-timeout; --force cuts them off."
            )
        management.unregister(name, version)
        stored_archive(instance, name, version).unlink(missing_ok=True)
        _record(
            instance, state, lambda models: tuple(one for one in models if (one.name, one.version) != (name, version))
        )
    return Unregistered(name, version, drained, round(time.monotonic() - began, 2))


@contextlib.contextmanager
def _changing(instance: Instance) -> Iterator[tuple[InstanceState, Management]]:
    """Hold the right to change what is served; the model store's folder is the lock, so nothing new lies about."""
    state = instance.require_running()
    if not state.ready:
        raise ServerError(f"Instance {instance.name!r} is still starting. Wait until it is ready.")
    handle = os.open(instance.model_store, os.O_RDONLY | os.O_DIRECTORY)
    try:
        deadline = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ServerError(
                        f"Another `detserve models` command changes instance {instance.name!r}. Wait for it."
                    ) from None
                time.sleep(_POLL_S)
        # What somebody else has changed while we waited.
        state = instance.require_running()
        with Management(instance, state) as management:
            yield state, management
    finally:
        os.close(handle)


def _record(
    instance: Instance,
    state: InstanceState,
    change: Callable[[tuple[ServedModel, ...]], tuple[ServedModel, ...]],
) -> None:
    """Write down what is served now, unless the server has ended meanwhile."""
    now = instance.read()
    if now is not None and (now.pid, now.created) == (state.pid, state.created):
        instance.write(replace(now, models=change(now.models)))


def _same(one: ServedModel, other: ServedModel) -> bool:
    return (one.name, one.version) == (other.name, other.version)


def _versions(management: Management, name: str) -> list[Description]:
    try:
        return management.versions(name)
    except NotServedError:
        return []


def _require_served(management: Management, name: str, version: str | None) -> Description:
    found = _versions(management, name)
    if not found:
        raise NotServedError(
            f"The server does not serve {name!r}; it serves: {', '.join(sorted(management.models())) or 'nothing'}."
        )
    if version is None:
        return management.describe(name)
    for one in found:
        if str(one["modelVersion"]) == version:
            return one
    there = ", ".join(str(one["modelVersion"]) for one in found)
    raise NotServedError(f"The server does not serve {name!r} {version}; there are the versions {there}.")


def _fresh_watch(instance: Instance) -> StartupWatch:
    """Watch the logs from now on: what died before is not ours."""
    watch = StartupWatch(instance.log_folder)
    watch.failure()
    watch.registration_error = None
    return watch


def _is_of(failure: WorkerFailure, management: Management, model: ServedModel) -> bool:
    """Return whether it is a worker of this version now: those of one that has just been taken out end late."""
    if (failure.model, failure.version) != (model.name, model.version):
        return False
    with contextlib.suppress(ServerError):
        workers = management.describe(model.name, model.version)["workers"]
        return failure.worker in {str(worker["id"]) for worker in workers}
    return True


def _wait_until_it_answers(
    management: Management,
    instance: Instance,
    state: InstanceState,
    model: ServedModel,
    watch: StartupWatch | None,
    timeout_s: float,
) -> None:
    deadline = time.monotonic() + timeout_s
    silent = False
    while True:
        with contextlib.suppress(NotAnsweringError):
            if management.answers(model.name, model.version, model.min_workers):
                return
        failure = None if watch is None else watch.failure()
        if failure is not None and not failure.type and not silent:
            # TorchServe may cut a worker's last words off. It starts it once more within a second: hear it again.
            silent = True
        elif failure is not None and _is_of(failure, management, model):
            known = replace(state, models=(*state.models, model))
            died = worker_died(instance, known, failure, outcome="What was served before is served still.")
            raise NotStartedError(str(died), model.name, model.version)
        if not is_alive(state):
            raise ServerError(
                f"The server of instance {instance.name!r} ended meanwhile. See `detserve serve logs server`."
            )
        if time.monotonic() > deadline:
            raise NotStartedError(
                f"Model {model.name!r} {model.version} was not ready after {timeout_s:g} s. Give it longer with "
                f"--timeout. Full log: {instance.log_folder / 'model_log.log'}",
                model.name,
                model.version,
            )
        time.sleep(_POLL_S)
