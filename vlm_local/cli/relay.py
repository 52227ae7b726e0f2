"""`relay`: hides from a station that its tunnel drops."""

import argparse

from vlm_local.relay import add_arguments, run


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "relay",
        help="hold a station's requests while its tunnel is down",
        description="Listens for a station and passes its requests on to the port where the tunnel ends.",
        epilog="vlm_local/relay.py needs Python alone: copy it to the gate; python3 relay.py takes the same.",
    )
    add_arguments(parser)
    parser.set_defaults(run=run)
