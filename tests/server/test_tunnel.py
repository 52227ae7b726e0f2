"""Against a real sshd on loopback, as its own user, with keys made for the test."""

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving import ask, find_free_port, serve, until
from tests.slow import slow
from vlm_local.errors import ConfigError
from vlm_local.server.tunnel import Tunnel, TunnelTarget, build_command, parse_target

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
MISSING = next((name for name in ("ssh", "ssh-keygen") if not shutil.which(name)), None if SSHD else "sshd")


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("me@gpu.example.org", TunnelTarget("gpu.example.org", 8000, "me")),
        ("me@gpu:2222", TunnelTarget("gpu", 8000, "me", 2222)),
        ("gpu", TunnelTarget("gpu", 8000)),
        ("me@[::1]:22", TunnelTarget("::1", 8000, "me", 22)),
    ],
)
def test_a_target_is_read(text, target):
    assert parse_target(text, 8000) == target


NO_TARGETS = ["", "me@", "-oProxyCommand=evil", "me@host:port", "a b@host", "me@-host", "host:1:2", "a:0", "a:70000"]


@pytest.mark.parametrize(("text", "port"), [*((text, 8000) for text in NO_TARGETS), ("host", -1), ("host", 65536)])
def test_what_is_no_target_is_refused(text, port):
    with pytest.raises(ConfigError, match="tunnel"):
        parse_target(text, port)


def test_the_command_forwards_to_this_server_and_asks_nothing():
    command = build_command(TunnelTarget("gpu", 9000, "me", 2222), 8000, ("ssh",))
    assert command[-4:] == ["9000:127.0.0.1:8000", "--", "me@gpu", "cat"]
    assert {"BatchMode=yes", "ExitOnForwardFailure=yes", "ServerAliveInterval=5"} <= set(command)
    assert "-p 2222 -R" in " ".join(command)


def test_a_port_that_is_still_taken_is_explained_with_its_mend(tmp_path):
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/bin/sh\necho 'Error: remote port forwarding failed for listen port 9000' >&2\nexit 255\n")
    ssh.chmod(0o755)
    tunnel = Tunnel(TunnelTarget("gate", 9000), 8000, (str(ssh),))
    try:
        until(lambda: tunnel.state.startswith("down: "))
        assert "ClientAliveInterval 5" in tunnel.state and "Port 9000 there is taken" in tunnel.state
    finally:
        tunnel.close()


class Sshd:
    """A private sshd: its folder holds its host key and the client's key, config and known hosts."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, find_free_port()
        for name in ("host", "client"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        shutil.copy(folder / "client.pub", folder / "authorized")
        (folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {folder}/authorized\nStrictModes no\nPermitRootLogin yes\n"
        )
        known = (folder / "host.pub").read_text().split()
        (folder / "known").write_text(f"[127.0.0.1]:{self.port} {known[0]} {known[1]}\n")
        (folder / "ssh_config").write_text(f"IdentityFile {folder}/client\nUserKnownHostsFile {folder}/known\n")
        self.ssh = ("ssh", "-F", str(folder / "ssh_config"))
        self.process = None

    def start(self):
        if SSHD.startswith("/usr/sbin") and getpass.getuser() == "root":
            Path("/run/sshd").mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", self.folder / "sshd_config"], stderr=subprocess.DEVNULL
        )
        until(lambda: _listens(self.port))

    def stop(self):
        """The daemon, and the sessions it has forked."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        self.process.terminate()
        self.process.wait(60)
        for child in children:
            subprocess.run(["kill", child], stderr=subprocess.DEVNULL, check=False)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@pytest.fixture
def sshd(tmp_path):
    if MISSING:
        pytest.skip(f"{MISSING} is not installed")
    tmp_path.chmod(0o700)
    daemon = Sshd(tmp_path)
    daemon.start()
    yield daemon
    if daemon.process.poll() is None:
        daemon.stop()


def test_up_killed_and_back_again(sshd):
    remote_port = find_free_port()
    target = parse_target(f"{getpass.getuser()}@127.0.0.1:{sshd.port}", remote_port)
    with serve() as server:
        tunnel = Tunnel(target, server.port, sshd.ssh)
        try:
            until(lambda: tunnel.state == "up")
            status, _, body = ask(remote_port, "GET", "/health")
            assert (status, json.loads(body)["status"]) == (200, "healthy")
            sshd.stop()
            until(lambda: tunnel.state.startswith("down: "))
            with pytest.raises(OSError):
                ask(remote_port, "GET", "/health")
            sshd.start()
            until(lambda: tunnel.state == "up")
            assert ask(remote_port, "GET", "/health")[0] == 200
        finally:
            tunnel.close()
        assert tunnel.state == "down: closed"
        with pytest.raises(OSError):
            ask(remote_port, "GET", "/health")


@pytest.mark.parametrize("pause_s", [0, slow(6)])
def test_an_account_that_may_run_nothing_still_gets_its_forward(sshd, pause_s):
    key = (sshd.folder / "authorized").read_text()
    (sshd.folder / "authorized").write_text(f'command="exit 1" {key}')
    remote_port = find_free_port()
    ssh = ("sh", "-c", f'sleep {pause_s}; exec "$@"', "-", *sshd.ssh)  # which may take long to connect
    with serve() as server:
        tunnel = Tunnel(parse_target(f"{getpass.getuser()}@127.0.0.1:{sshd.port}", remote_port), server.port, ssh)
        until(lambda: tunnel.state.startswith("up without a session"))
        assert ask(remote_port, "GET", "/health")[0] == 200
        tunnel.close()


def test_a_remote_port_that_is_taken_says_so_and_is_tried_again(sshd):
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as taken:
        remote_port = taken.getsockname()[1]
        tunnel = Tunnel(parse_target(f"{getpass.getuser()}@127.0.0.1:{sshd.port}", remote_port), 9, sshd.ssh)
        until(lambda: tunnel.state.startswith("down: "))
        assert "remote port forwarding failed" in tunnel.state
    until(lambda: tunnel.state == "up")
    tunnel.close()


def test_a_key_that_is_not_accepted_says_so(sshd):
    (sshd.folder / "authorized").write_text("")
    tunnel = Tunnel(parse_target(f"{getpass.getuser()}@127.0.0.1:{sshd.port}", 0), 9, sshd.ssh)
    until(lambda: tunnel.state.startswith("down: "))
    assert "Permission denied" in tunnel.state
    tunnel.close()


def test_ssh_ends_with_its_server_however_that_ends(sshd):
    remote_port = find_free_port()
    script = (
        "import sys, time; from vlm_local.server.tunnel import Tunnel, parse_target\n"
        "tunnel = Tunnel(parse_target(sys.argv[1], int(sys.argv[2])), 9, sys.argv[3:])\n"
        "while tunnel.state != 'up': time.sleep(0.02)\n"
        "print('up', flush=True); time.sleep(60)\n"
    )
    where = f"{getpass.getuser()}@127.0.0.1:{sshd.port}"
    command = [sys.executable, "-c", script, where, str(remote_port), *sshd.ssh]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGKILL)
    until(lambda: not _listens(remote_port))


@pytest.mark.slow
def test_serve_keeps_a_tunnel_and_ends_it(sshd, tmp_path):
    wrapper = tmp_path / "bin" / "ssh"  # stands for what a user has in ~/.ssh
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {sshd.folder}/ssh_config "$@"\n')
    wrapper.chmod(0o755)
    remote_port = find_free_port()
    flags = ["--tunnel", f"{getpass.getuser()}@127.0.0.1:{sshd.port}", "--remote-port", str(remote_port)]
    command = [sys.executable, "-m", "vlm_local", "serve", "--model", "stop", "--port", "0", "--record", "off", *flags]
    environment = {**os.environ, "PATH": f"{wrapper.parent}:{os.environ['PATH']}"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        next(line for line in process.stdout if line.startswith("ready: "))

        def is_up():
            try:
                return json.loads(ask(remote_port, "GET", "/health")[2]).get("tunnel") == "up"
            except OSError:
                return False

        until(is_up)
        process.terminate()
        _, log = process.communicate(timeout=60)
        assert process.returncode == 0 and "tunnel is up" in log
    with pytest.raises(OSError):
        ask(remote_port, "GET", "/health")


def test_without_an_ssh_client_the_mend_is_said():
    tunnel = Tunnel(TunnelTarget("gpu", 0), 9, ("no-such-ssh",))
    until(lambda: tunnel.state.startswith("down: "))
    assert "install an ssh client" in tunnel.state
    tunnel.close()
