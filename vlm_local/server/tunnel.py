"""A reverse ssh forward, kept up: the robot's side reaches this server at the other host."""

import logging
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic

from vlm_local.errors import ConfigError
from vlm_local.processes import tie_to_parent

logger = logging.getLogger(__name__)

_TARGET = re.compile(r"(?:(?P<user>[\w.-]+)@)?(?P<host>[A-Za-z0-9][\w.-]*|\[[0-9a-fA-F:]+\])(?::(?P<port>\d{1,5}))?")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_SSH_FAILED = 255  # ssh's own status; any other is the remote command's
_REFUSED_S = 5.0  # an account that may run nothing ends its session sooner after the forward stands
_OPTIONS = {
    "BatchMode": "yes",  # nobody is there to type a password
    "ExitOnForwardFailure": "yes",
    "ServerAliveInterval": "5",  # with the next one, a link that dies silently is noticed within 15 s
    "ServerAliveCountMax": "2",
    "ConnectTimeout": "10",
    "ControlPath": "none",  # a shared connection would outlive this one
}
_PORT_TAKEN = "remote port forwarding failed"
_UP = re.compile(r"remote forward success|Allocated port (?P<port>\d+) for remote forward")


@dataclass(frozen=True)
class TunnelTarget:
    """remote_port: on the other host; 0 lets its sshd choose."""

    host: str
    remote_port: int
    user: str | None = None
    port: int | None = None

    def __str__(self) -> str:
        return f"{self.user}@{self.host}" if self.user else self.host


def parse_target(text: str, remote_port: int) -> TunnelTarget:
    """ "user@host[:port]" -> target. Raises ConfigError."""
    match = _TARGET.fullmatch(text)
    if match is None or not 0 <= remote_port < 2**16 or not 0 < int(match["port"] or 22) < 2**16:
        raise ConfigError(
            f"tunnel {text!r}, remote port {remote_port}: expected user@host or user@host:port, and a port"
        )
    port = match["port"]
    return TunnelTarget(match["host"].strip("[]"), remote_port, match["user"], None if port is None else int(port))


class Tunnel:
    """Runs ssh until closed; starts it again, with growing pauses, whenever it ends."""

    def __init__(self, target: TunnelTarget, local_port: int, ssh: Sequence[str] = ("ssh",)):
        """ssh: the program, with options where the user's ~/.ssh/config does not have them."""
        self._target = target
        self._local_port, self._ssh = local_port, ssh
        self._has_session = True
        self._is_session_ended = False  # by the other host, which kept the connection
        self._closed = threading.Event()
        self._process: subprocess.Popen | None = None
        self._state, self._up_since = "connecting", 0.0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="tunnel", daemon=True)
        self._thread.start()

    @property
    def state(self) -> str:
        """ "connecting", "up", "up without a session: ..." or "down: REASON"."""
        return self._state

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            if self._process is not None:
                self._process.terminate()
        self._thread.join(5)

    def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._closed.is_set():
            start = monotonic()
            reason = self._connect()
            if self._closed.is_set():
                break
            lasted_s = monotonic() - start
            if lasted_s > _LONGEST_PAUSE_S:
                pause_s = _FIRST_PAUSE_S
            is_refused = self._is_session_ended and self._state == "up" and monotonic() - self._up_since < _REFUSED_S
            self._has_session = not (self._has_session and is_refused)  # one that was refused is asked for again later
            self._state = f"down: {reason}"
            logger.warning("tunnel to %s is down: %s; trying again in %g s", self._target, reason, pause_s)
            self._closed.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        self._state = "down: closed"

    def _connect(self) -> str:
        """Run ssh to its end; returns why it ended."""
        command = build_command(self._target, self._local_port, self._ssh, self._has_session)
        if shutil.which(command[0]) is None:
            return f"cannot run {command[0]}; install an ssh client"
        with self._lock:
            if self._closed.is_set():
                return "closed"
            try:
                self._process = subprocess.Popen(
                    tie_to_parent(command, signal.SIGTERM),
                    stdin=subprocess.PIPE,  # never written to: the session ends when it closes, at the latest with us
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                    start_new_session=True,  # Ctrl-C in the terminal is ours to pass on
                )
            except OSError as error:
                return f"cannot run ssh ({error}); install an ssh client"
        last = ""
        with self._process as process:
            for line in process.stderr or ():
                line = line.strip()
                if match := _UP.search(line):
                    self._announce(match["port"] or self._target.remote_port)
                elif line and not line.startswith(
                    ("debug", "OpenSSH_", "Authenticated to", "Transferred:", "Bytes per")
                ):
                    last = line
        self._is_session_ended = process.returncode != _SSH_FAILED or "open failed" in last
        if _PORT_TAKEN in last:
            last += (
                f". Port {self._target.remote_port} there is taken, most often by this tunnel's last connection, which "
                "its sshd has not given up: let its sshd_config say ClientAliveInterval 5 and ClientAliveCountMax 2"
            )
        return last or f"ssh ended with status {process.returncode}"

    def _announce(self, port: int | str) -> None:
        if not self._state.startswith("up"):
            logger.info("tunnel is up: port %s of %s leads here", port, self._target)
        self._up_since = monotonic()
        self._state = "up" if self._has_session else "up without a session: a step may take 40 ms longer"


def build_command(target: TunnelTarget, local_port: int, ssh: Sequence[str], has_session: bool = True) -> list[str]:
    """-v: that a forward stands is only said at this level.

    has_session: whether a remote `cat` keeps a session open. Without one, OpenSSH sends small packets late.
    """
    options = [part for name, value in _OPTIONS.items() for part in ("-o", f"{name}={value}")]
    port = [] if target.port is None else ["-p", str(target.port)]
    forward = f"{target.remote_port}:127.0.0.1:{local_port}"
    no_command, command = ([], ["cat"]) if has_session else (["-N"], [])
    return [*ssh, "-v", *no_command, "-T", *options, *port, "-R", forward, "--", str(target), *command]
