"""`serve`: a model's policy over HTTP."""

import argparse

from vlm_local.cli.options import add_policy_options, count, number, port, read_policy_options, seed
from vlm_local.errors import ConfigError

_HELP = "answer robots over HTTP"
_TOKEN_VARIABLE = "VLM_LOCAL_TOKEN"
_LOG_LINE = "%(asctime)s %(levelname)s %(message)s"
MAX_HORIZON = 100  # steps; OpenPI's clients play 5 to 10
_DEADLINE_MS = 60_000.0  # a hung forward ends the wait; AutoEval itself would wait for ever


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("serve", help=_HELP)
    add_policy_options(parser)
    parser.set_defaults(run=run, deadline_ms=_DEADLINE_MS)
    server = parser.add_argument_group("server").add_argument
    server("--host", default="127.0.0.1", help="address to listen on [127.0.0.1]")
    server("--port", type=port, default=8000, help="0 takes any that is free and prints it [8000]")
    server("--prefix", default="", metavar="/PATH", help="answer below this path, too")
    server("--seed", type=seed, default=0, help="of the seeds of episodes that are reset without one [0]")
    text = "hold a robot's request open while the model loads, then 503 [60]"
    server("--hold-loading", type=number(0, 3600), default=60.0, metavar="S", help=text)
    server("--record", default="runs", metavar="DIR|off", help="where each start records its own run [runs]")
    text = "delete the run's oldest episodes above this [never]"
    server("--record-max-gb", type=number(0.001, 1e6), metavar="GB", help=text)
    episodes = parser.add_argument_group("episodes of robots that never reset").add_argument
    text = "a new one begins where the arm has moved further than this between two steps [0.1]"
    episodes("--episode-jump", type=number(0.001, 10), default=0.1, metavar="M", help=text)
    text = "and after a pause of this length [120]"
    episodes("--episode-idle", type=number(0, 1e6), default=120.0, metavar="S", help=text)
    text = "follow: a gripper that someone else moved counts as it is measured; ignore: as commanded [follow]"
    episodes("--gripper-moved", choices=("follow", "ignore"), default="follow", help=text)
    safety = parser.add_argument_group("safety").add_argument
    text = "autoeval-drawer, -sink, -cloth, a station in --embodiment FILE, or x0:x1,y0:y1,z0:z1 in metres"
    safety("--workspace", metavar="NAME|BOX", help=text)
    text = "largest step, metres and radians [the embodiment's: 0.05 m, 0.25 rad]"
    safety("--max-step", metavar="X,Y,Z,R,P,Y", help=text)
    safety("--on-fault", choices=("hold", "error"), default="hold", help="stand still, or answer 503 [hold]")
    safety("--max-held", type=count(0), default=5, metavar="N", help="faults in a row that are held [5]")
    access = parser.add_argument_group("who gets in").add_argument
    access("--token", help=f"bearer header, or the path /t/TOKEN/act [{_TOKEN_VARIABLE} of the environment]")
    access("--token-file", metavar="FILE", help="holds the token, which other users could read on a command line")
    access("--allow-from", default="", metavar="CIDR,...", help="addresses that need no token")
    access("--host-name", default="", metavar="NAME,...", help="names that this machine has elsewhere, as at a tunnel")
    access("--insecure", action="store_true", help="listen to other machines without token or --allow-from")
    access("--rate-limit", type=number(0.001, 1e6), metavar="N", help="requests to /act a second and address [any]")
    websocket = parser.add_argument_group("websocket", "for clients of OpenPI, RoboArena and vla-eval").add_argument
    text = "listen here, too; 0 takes any that is free and prints it [no websocket]"
    websocket("--websocket-port", type=port, metavar="N", help=text)
    text = "steps in an answer, for which its phrase is repeated [--steps-per-phrase]"
    websocket("--horizon", type=count(1, MAX_HORIZON), metavar="N", help=text)
    tunnel = parser.add_argument_group("tunnel").add_argument
    tunnel("--tunnel", metavar="USER@HOST[:PORT]", help="keep a reverse ssh forward from there to here")
    tunnel("--remote-port", type=port, metavar="N", help="of the forward [--port]")


def run(args: argparse.Namespace) -> int:
    import logging
    import os

    from vlm_local.logs import STDOUT, LineWriter, start_logging
    from vlm_local.plain import make_log_plain

    start_logging(_LOG_LINE, logging.WARNING if args.quiet else logging.INFO)
    make_log_plain(_LOG_LINE)
    for client in ("httpx", "httpx2"):  # below the openai package: a line for every request
        logging.getLogger(client).setLevel(logging.WARNING)
    from vlm_local.assembly import open_policies
    from vlm_local.processes import share_heaps
    from vlm_local.server.serve import RunningServer, bind, serve_until_stopped

    share_heaps()
    settings, options = read_settings(args), read_run_options(args)
    listener = bind(args.host, args.port)
    policies = open_policies(read_policy_options(args), apart=True)
    settings = fill_in(settings, args, policies.embodiment)
    server = RunningServer(policies, settings, options, listener)
    url = server.url + settings.prefix
    out = LineWriter(STDOUT)

    def tell_loading():
        out.put(f"loading {policies.metadata.get('model')}; {url}/health tells when it answers")
        recorded = "nothing is recorded" if server.run_folder is None else f"recording to {server.run_folder}"
        out.put(f"open {url}/{'t/TOKEN/' if _find_token(args) else ''} in a browser; {recorded}")

    def tell_ready():
        trained = policies.metadata.get("trained")
        out.put(f"ready: {policies.metadata.get('model')} at {url}" + (", trained" if trained else ""))
        if server.websocket_url is not None:
            out.put(f"websocket: {server.websocket_url} for OpenPI, {server.websocket_url}vla-eval for vla-eval")
        if trained is False:
            out.put("warning: the weights are untrained, so the answers mean nothing")

    try:
        ended = serve_until_stopped(server, tell_loading, tell_ready)
    finally:
        out.close()
    if ended:
        return 0
    logging.shutdown()
    os._exit(0)  # a forward still runs; the interpreter cannot end its thread in order


def read_settings(args: argparse.Namespace):
    """Parsed flags -> ServerSettings. Raises ConfigError, also for an open door nobody asked for."""
    import ipaddress

    from vlm_local.safety import MAX_STEP, parse_max_step, parse_workspace
    from vlm_local.server.access import Gate, parse_networks
    from vlm_local.server.episodes import EpisodeSettings
    from vlm_local.server.service import ServerSettings

    gate = Gate(_find_token(args), parse_networks(args.allow_from))
    try:
        is_local = args.host == "localhost" or ipaddress.ip_address(args.host).is_loopback
    except ValueError:
        is_local = False
    if gate.is_open and not is_local:
        if not args.insecure:
            raise ConfigError(
                f"--host {args.host} lets every machine that can reach this one drive the robot; "
                "set --token or --allow-from, or say --insecure"
            )
        print(f"warning: whoever reaches {args.host} port {args.port} can drive the robot", flush=True)
    if args.prefix and not (args.prefix.startswith("/") and not args.prefix.endswith("/")):
        raise ConfigError(f"--prefix must start with '/' and not end with it, but is {args.prefix!r}")
    return ServerSettings(
        episodes=EpisodeSettings(args.seed, args.episode_jump, args.episode_idle, args.gripper_moved == "follow"),
        loading_s=args.hold_loading,
        gate=gate,
        prefix=args.prefix,
        names=frozenset(name.strip().lower() for name in args.host_name.split(",") if name.strip()),
        on_fault=args.on_fault,
        max_held=args.max_held,
        rate_limit=args.rate_limit,
        workspace=None if args.workspace is None else parse_workspace(args.workspace, args.embodiment),
        max_step=MAX_STEP if args.max_step is None else parse_max_step(args.max_step),
    )


def fill_in(settings, args: argparse.Namespace, name: str):
    """ServerSettings with what no flag says, as the embodiment of this name has it."""
    from dataclasses import replace
    from typing import Any

    from vlm_local.embodiments import AUTO, BRIDGE, load_embodiment
    from vlm_local.safety import Workspace

    embodiment = load_embodiment(BRIDGE if name == AUTO else name)
    changes: dict[str, Any] = {"embodiment": name}
    if args.max_step is None:
        changes["max_step"] = tuple(embodiment.max_step)
    if args.workspace is None and embodiment.workspace_m is not None:
        changes["workspace"] = Workspace(*[(low, high) for low, high in embodiment.workspace_m])
    return replace(settings, **changes)


def _find_token(args: argparse.Namespace) -> str | None:
    """From the flag, the file or the environment, in this order. Raises ConfigError."""
    import os
    from pathlib import Path

    if args.token_file is None:
        return os.environ.get(_TOKEN_VARIABLE) or None if args.token is None else args.token
    if args.token is not None:
        raise ConfigError("--token and --token-file both name the token; give one of them")
    try:
        return Path(args.token_file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--token-file {args.token_file} cannot be read ({error})") from None


def read_run_options(args: argparse.Namespace):
    """Parsed flags -> RunOptions. Raises ConfigError."""
    from pathlib import Path

    from vlm_local.server.serve import RunOptions
    from vlm_local.server.tunnel import parse_target

    remote_port = args.port if args.remote_port is None else args.remote_port
    if args.tunnel is None and args.remote_port is not None:
        raise ConfigError("--remote-port belongs to --tunnel, which is missing")
    if args.websocket_port is None and args.horizon is not None:
        raise ConfigError("--horizon belongs to --websocket-port, which is missing")
    return RunOptions(
        record=None if args.record == "off" else Path(args.record),
        max_record_bytes=None if args.record_max_gb is None else int(1e9 * args.record_max_gb),
        tunnel=None if args.tunnel is None else parse_target(args.tunnel, remote_port),
        websocket_port=args.websocket_port,
        horizon=args.horizon,
    )
