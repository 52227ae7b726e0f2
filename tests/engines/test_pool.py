"""Which server of several is asked, and for how long: servers that are names, and jobs that fail as they are told."""

import asyncio
from dataclasses import dataclass

import pytest

from vlm_local.engines.pool import ServerPool
from vlm_local.errors import ConfigError, RemoteError


@dataclass(eq=False)
class Name:
    """failure: of each attempt to connect it, None for a server that is there."""

    url: str
    failure: Exception | None


async def _connect(server):
    if server.failure is not None:
        raise server.failure


def _open(*failures):
    return ServerPool([Name(f"http://{number}", each) for number, each in enumerate(failures)], _connect)


def _play(pool, outcomes, deadline_s=60.0, **options):
    """Open `pool` and ask it as the robot "a". outcomes: by server, (seconds, what is raised or answered).

    Returns (the answer or the failure's kind, URLs in the order in which they were asked).
    """
    asked = []

    async def job(server):
        asked.append(server.url)
        seconds, outcome = outcomes[server.url]
        await asyncio.sleep(seconds)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def play():
        await pool.open()
        try:
            return await pool.run("a", job, deadline_s, **options)
        except RemoteError as error:
            return error.kind

    return asyncio.run(play()), asked


DROPPED, REFUSED = RemoteError("it hung up", "connection"), RemoteError("too many", "refused")


def test_a_retry_asks_the_next_server_that_is_up():
    outcomes = {"http://0": (0, DROPPED), "http://1": (0, "one"), "http://2": (0, "two")}
    assert _play(_open(None, None, None), outcomes) == ("one", ["http://0", "http://1"])
    assert _play(_open(None, DROPPED, None), outcomes) == ("two", ["http://0", "http://2"])


def test_a_retry_has_what_is_left_of_the_deadline():
    outcomes = {"http://0": (0.2, DROPPED), "http://1": (0.3, "too late")}
    assert _play(_open(None, None), outcomes, deadline_s=0.4)[0] == "timeout"


def test_what_is_refused_is_not_asked_again_as_it_was():
    outcomes = {"http://0": (0, REFUSED), "http://1": (0, "one")}
    assert _play(_open(None, None), outcomes) == ("refused", ["http://0"])


def test_a_server_that_cannot_be_used_is_named_before_one_that_is_away():
    with pytest.raises(ConfigError, match="says anything"):
        _play(_open(DROPPED, ConfigError("it says anything"), None), {})
