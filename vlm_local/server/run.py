"""A whole server, from the first socket to an orderly end."""

import itertools
import logging
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm_local.errors import ConfigError
from vlm_local.libc import trim_heaps
from vlm_local.server.kept import find_previous
from vlm_local.server.observed import ObservedApp
from vlm_local.server.serve import HTTPServer
from vlm_local.server.service import Policies, ServerSettings
from vlm_local.server.tunnel import Tunnel, TunnelTarget

logger = logging.getLogger(__name__)

GRACE_S = 4.0  # for what is in flight when the server is told to stop
_ANSWER_S = 1.0  # for the 503 of what was not done by then
_FLUSH_S = 5.0  # for the recording
_TRIM_EVERY_S = 5.0


@dataclass(frozen=True)
class Surroundings:
    """What a server has beside its routes.

    record: where runs are recorded, each start in a folder of its own; None records nothing.
    max_record_bytes: above it the oldest episodes of the run are deleted.
    """

    record: Path | None = None
    max_record_bytes: int | None = None
    tunnel: TunnelTarget | None = None


class RunningServer:
    """Answers /health from the start, robots once the model is loaded."""

    def __init__(self, policies: Policies, settings: ServerSettings, around: Surroundings, listener: socket.socket):
        self._policies = policies
        port = listener.getsockname()[1]
        previous = None if around.record is None else find_previous(around.record, port)
        run = self.run_folder = None if around.record is None else _make_run(around.record, policies.metadata)
        names = {socket.gethostname().lower()} | ({around.tunnel.host.lower()} if around.tunnel else set())
        settings = replace(settings, names=settings.names | names)
        self._observed = ObservedApp(policies, settings, run, around.max_record_bytes, previous, port)
        self._service = self._observed.service
        if (held := self._service.kept.describe()) != {"all": None, "robots": {}}:
            logger.warning("still held from %s, until POST /release: %s", previous, held)
        self._http = HTTPServer(self._observed.app, listener)
        self.url = self._http.url
        self._tunnel = None if around.tunnel is None else Tunnel(around.tunnel, self._http.port)
        if self._tunnel is not None:
            self._service.report["tunnel"] = lambda: self._tunnel.state

    def wait_loaded(self, is_stopped: Callable[[], bool]) -> bool:
        """Wait for the model; False when `is_stopped` came first. Raises what the load raised."""
        worker = self._policies.worker
        while worker is not None and not worker.wait_loaded(0.1):
            if is_stopped():
                return False
        return True

    def stop(self) -> bool:
        """Let those inside finish, refuse what is left, flush the recording. True when no forward runs any more."""
        self._observed.end_streams()
        if not self._service.drain(GRACE_S):
            logger.warning("what did not finish within %g s gets a 503", GRACE_S)
        worker = self._policies.worker
        ended = worker is None or worker.close()
        self._service.drain(_ANSWER_S)
        if not self._observed.close(_FLUSH_S):
            logger.error("the recording could not be written to its end within %g s", _FLUSH_S)
        if self._tunnel is not None:
            self._tunnel.close()
        self._http.stop()
        return ended


def serve_until_stopped(
    server: RunningServer, tell_loading: Callable[[], None], tell_ready: Callable[[], None]
) -> bool:
    """Serve until SIGTERM or SIGINT, a second of which ends the process at once. Returns as `stop`.

    tell_loading, tell_ready: called once a signal ends the server in order, and once the model is loaded.
    """
    stopped = threading.Event()

    def stop(number, frame):
        stopped.set()
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, signal.SIG_DFL)

    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, stop)
    try:
        tell_loading()
        if server.wait_loaded(stopped.is_set):
            tell_ready()
            while not stopped.wait(_TRIM_EVERY_S):
                trim_heaps()  # or memory creeps up for hours: requests of 200 kB leave holes
    finally:
        ended = server.stop()
    return ended


def _make_run(parent: Path, metadata: Mapping[str, Any]) -> Path:
    """A new folder for this start, by time and model; servers that start in the same second get one each."""
    model = re.sub(r"[^A-Za-z0-9_.-]+", "-", str(metadata.get("model") or "model").rpartition("/")[2])
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{model}"
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            reason = f"cannot record into {parent} ({error}); choose another --record DIR, or off"
            raise ConfigError(reason) from None
