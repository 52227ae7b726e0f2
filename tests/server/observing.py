"""A server with its recording, live page and metrics, over a scripted engine."""

from contextlib import contextmanager
from dataclasses import dataclass

from tests.serving import Policies, Served, SteeredEngine
from vlm_local.answers import Answerer
from vlm_local.prompts import load_template
from vlm_local.server.observers import ObservedApp
from vlm_local.server.serve import HTTPServer, bind
from vlm_local.server.service import ServerSettings


@dataclass
class Observed(Served):
    observed: ObservedApp


@contextmanager
def observe(run=None, settings=None, engine=None, previous=None, **policy_settings):
    engine = SteeredEngine() if engine is None else engine
    policies = Policies(engine, **policy_settings)
    policies.answerer = Answerer(policies.worker.generate, load_template("answer"))
    observed = ObservedApp(policies, settings or ServerSettings(), run, previous=previous)
    server = HTTPServer(observed.app, bind("127.0.0.1", 0))
    try:
        policies.worker.wait_loaded(60)
        yield Observed(server, engine, [], observed)
    finally:
        if isinstance(engine, SteeredEngine):
            engine.gate.set()
        observed.end_streams()
        policies.worker.close()
        server.service.drain(2)
        server.stop()
        observed.close(2)
