"""An engine that does as the question says. Its process imports this module, so nothing heavy is imported here."""

import os
import signal
import time
from pathlib import Path

import numpy as np

from vlm_local.engines.scripted import ScriptedEngine
from vlm_local.errors import ConfigError, EngineError, RequestError
from vlm_local.types import GenerationRequest, Prompt, Thought

CHOICES = ("yes", "no", "perhaps")


class OddEngine(ScriptedEngine):
    """Says its last choice; the question says what it does instead."""

    def __init__(self):
        super().__init__(lambda request: np.arange(len(request.sentences)), "odd")
        self.forgotten = []

    @property
    def metadata(self):
        return {**super().metadata, "pid": os.getpid(), "forgotten": list(self.forgotten)}

    def generate(self, requests):
        for request in requests:
            if request.prompt.after == "raise":
                raise ZeroDivisionError("nothing to divide by")
            if request.prompt.after == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if request.prompt.after in ("hang", "slow"):
                time.sleep(600 if request.prompt.after == "hang" else 0.6)
        return list(map(self._answer_alone, requests))

    def _answer_alone(self, request):
        if request.prompt.after == "narrow":
            return RequestError("the picture is too narrow", 422)
        if request.prompt.after == "odd":
            return EngineError("the request could not be prepared: ValueError: an odd picture")
        return super().generate([request])[0]

    def think(self, episode, request=None):
        """Two pieces: the second says what the first one's pictures and question were."""
        if request is not None:
            self.begun = request
            return "look"
        if self.begun.prompt.after == "raise":
            raise ZeroDivisionError("nothing to divide by")
        shown = [int(picture.pixels.sum()) for picture in self.begun.prompt.pictures]
        return Thought(f"TASK: {self.begun.prompt.after} {shown}", 2)

    def forget(self, episode):
        self.forgotten.append(episode)


def load_and_tell(path, again_s=0.5):
    """Writes its process id to `path`, then takes a while if it is not the first that did."""
    is_first = not Path(path).exists()
    Path(path).write_text(str(os.getpid()))
    time.sleep(0 if is_first else again_s)
    return OddEngine()


def refuse():
    raise ConfigError("no such model")


def fail():
    raise MemoryError("no room")


def ask(what="", episode="robot/0"):
    return GenerationRequest(np.zeros((8, 8, 3), np.uint8), Prompt("", what), CHOICES, episode=episode)
