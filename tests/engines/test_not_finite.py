"""Numbers of a model that are not finite are a fault, never an answer."""

import math

import numpy as np
import pytest
import safetensors.torch
import tokenizers

from tests.hearing import PICTURES, hear, write_few
from tests.serving import SteeredEngine, serve
from vlm_local.assembly import open_policies
from vlm_local.errors import EngineError
from vlm_local.policy_options import PolicyOptions
from vlm_local.types import Observation


def _spoil(folder, end, row=slice(None)):
    file = folder / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights[next(name for name in weights if name.endswith(end))][row] = math.nan
    safetensors.torch.save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize("decide", ["greedy", "map", "sample"])
@pytest.mark.parametrize("decoder", ["trie", "outlines"])
def test_a_model_that_is_not_finite_at_warm_up_does_not_start(folder, decoder, decide):
    _spoil(folder, "layers.1.mlp.down_proj.weight")
    with pytest.raises(EngineError, match=r"not finite.*--dtype bfloat16 or float32"):
        hear(folder, decoder=decoder, decide=decide, grammar=write_few(folder))


def test_a_word_that_spoils_the_numbers_is_a_fault_and_the_next_step_is_not(folder):
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    _spoil(folder, "embed_tokens.weight", tokenizer.encode("9").ids)
    policies = open_policies(PolicyOptions(model=str(folder), offline=True))
    try:
        robot = policies.build("robot")
        for words in ("go", "go 9", "go"):
            if "9" in words:
                with pytest.raises(EngineError, match="not finite"):
                    robot.act(Observation(PICTURES[0], words))
            else:
                assert robot.act(Observation(PICTURES[0], words)).probability > 0
    finally:
        policies.close()


class Undecided(SteeredEngine):
    def generate(self, requests):
        with np.errstate(invalid="ignore"):
            self.phrase = ""  # all weights 0, so probabilities are 0 / 0
            return super().generate(requests)


def test_probabilities_that_are_not_finite_never_leave_the_server():
    with serve(Undecided()) as served:
        assert "not finite" in served.act()["fault"]
