"""The reference decoder: outlines masks every step of transformers' own `generate`.

It is slow and simple, and every faster decoder is compared with it. A greedy answer takes a forward for each token.
Whatever needs probabilities scores every sentence of the grammar in full, prompt and image included.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter

import numpy as np
import torch
import transformers

from vlm_local.decoding.distribution import refuse_not_finite
from vlm_local.decoding.families import LoadedModel
from vlm_local.decoding.prepared import PreparedRequest
from vlm_local.decoding.session import find_taken_out
from vlm_local.decoding.trie import MAX_GRAMMARS, tokenize_sentences
from vlm_local.errors import EngineError
from vlm_local.types import Generation

_SCORED_AT_ONCE = 27  # sentences a forward
_END = -1  # in place of an end token, which a grammar does not spell
_Allowed = dict[tuple[int, ...], list[int]]  # what has been said -> the tokens that may follow


class OutlinesDecoder:
    """Answers prepared requests one by one; keeps nothing of an episode."""

    def __init__(self, loaded: LoadedModel):
        import outlines  # a tenth of the time that a server's imports take, and most servers never need it
        from outlines.backends.llguidance import LLGuidanceBackend

        self._loaded = loaded
        self._backend = LLGuidanceBackend(outlines.from_transformers(loaded.model, loaded.tokenizer))
        self._keep_grammar = functools.lru_cache(MAX_GRAMMARS)(self._build_grammar)

    def decode(self, prepared: Sequence[PreparedRequest]) -> list[Generation]:
        return [self._answer(each) for each in prepared]

    def forget(self, episode: str) -> None:
        """Nothing is kept."""

    def _answer(self, prepared: PreparedRequest) -> Generation:
        start = perf_counter()
        request = prepared.request
        tokens, grammar = self._prepare_grammar(prepared)
        compiled = perf_counter()
        scores, probabilities, forwards = np.empty((2, 0)), None, 0
        if request.posterior != "off" or request.decide != "greedy":
            scores, forwards = self.score(prepared, tokens, request.temperature)  # (2, S)
            probabilities = np.exp(scores[0])
        if request.decide == "greedy":
            index = self._generate(prepared, tokens, grammar)
            forwards += len(tokens[index]) + 1
        elif request.decide == "map":
            index = int(scores[0].argmax())
        else:
            cumulative = np.exp(scores[1]).cumsum()
            index = int(np.searchsorted(cumulative, request.uniform * cumulative[-1], side="right"))
        end = perf_counter()
        told = probabilities if request.posterior != "off" else None
        return Generation(
            request.sentences[index],
            told,
            None if told is None else max(0.0, 1.0 - float(told.sum())),
            timings_ms={"grammar": 1e3 * (compiled - start), "decode": 1e3 * (end - compiled)},
            stats={"forwards": forwards},
        )

    def list_processors(self, grammar: str) -> list:
        """What `generate` passes each token's scores through, in this order, before it takes the largest."""
        return [self._backend.get_cfg_logits_processor(grammar)]

    def _prepare_grammar(self, prepared: PreparedRequest) -> tuple[list[list[int]], str]:
        return self._keep_grammar(prepared.request.sentences, int(prepared.input_ids[-1]))

    def _build_grammar(self, sentences: tuple[str, ...], last_prompt_id: int) -> tuple[list[list[int]], str]:
        loaded = self._loaded
        tokens = tokenize_sentences(loaded.tokenizer, sentences, last_prompt_id, loaded.eos_token_id, loaded.lead)
        return tokens, build_token_grammar(tokens)

    @torch.inference_mode()
    def _generate(self, prepared: PreparedRequest, tokens: list[list[int]], grammar: str) -> int:
        """Greedy answer under the mask -> index of its sentence."""
        loaded = self._loaded
        input_ids = prepared.input_ids[None].to(loaded.device)  # (1, L)
        # Spelled out, or generate() takes what is missing from the checkpoint: a repetition penalty, say.
        options = transformers.GenerationConfig(
            max_new_tokens=max(map(len, tokens)) + 1,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            temperature=1.0,
            top_k=50,
            top_p=1.0,
            eos_token_id=loaded.eos_token_id,
            pad_token_id=loaded.eos_token_id,
        )
        # outlines' mask is a torch.compile kernel: seconds, and a C++ compiler, for one logical and.
        with torch.compiler.set_stance("force_eager"):
            output = loaded.model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                **self._place(prepared),
                generation_config=options,
                logits_processor=[
                    _check_scores,
                    _build_contrast(prepared, list_allowed(tokens, loaded.eos_token_id)),
                    *self.list_processors(grammar),
                ],
            )
        return read_answer(output[0, input_ids.shape[1] :].tolist(), tokens, loaded.eos_token_id)

    def _place(self, prepared: PreparedRequest) -> dict[str, torch.Tensor]:
        return {name: value.to(self._loaded.device) for name, value in prepared.join_vision().items()}

    @torch.inference_mode()
    def score(self, prepared: PreparedRequest, tokens: list[list[int]], temperature: float) -> tuple[np.ndarray, int]:
        """Log-probability of every sentence, float64 (2, S), and the number of forwards it took.

        Row 0 at temperature 1, row 1 at `temperature`: the sum over a sentence's tokens and the end
        token of the log-softmax restricted to the tokens that the grammar allows there.
        """
        allowed = list_allowed(tokens, self._loaded.eos_token_id)
        taken_out = _split_taken_out(prepared, allowed)
        scores = np.zeros((2, len(tokens)))
        for sentence, before, said, logits in self._read_places(prepared, tokens, allowed):
            values = logits - taken_out[before]
            for line, divisor in enumerate((1.0, temperature)):
                scores[line, sentence] += _log_softmax(values / divisor)[allowed[before].index(said)]
        return scores, -(-len(tokens) // _SCORED_AT_ONCE)

    @torch.inference_mode()
    def read_blank(self, prepared: PreparedRequest) -> np.ndarray:
        """Log-probabilities of all tokens that the grammar allows, in the order of `list_allowed`."""
        tokens, _ = self._prepare_grammar(prepared)
        allowed = list_allowed(tokens, self._loaded.eos_token_id)
        places = self._read_places(prepared, tokens, allowed)
        known = {before: _log_softmax(logits) for _, before, _, logits in places}
        return np.concatenate([known[before] for before in allowed])

    def _read_places(
        self, prepared: PreparedRequest, tokens: list[list[int]], allowed: _Allowed
    ) -> Iterator[tuple[int, tuple[int, ...], int, np.ndarray]]:
        """Of every sentence and each of its tokens: index of the sentence, the tokens before, the token, and the
        logits float64 (n,) of what is allowed there. Raises EngineError where one is not finite.
        """
        for first in range(0, len(tokens), _SCORED_AT_ONCE):
            chunk = tokens[first : first + _SCORED_AT_ONCE]
            logits = self._forward(prepared, chunk).float().cpu().numpy()  # (n, longest + 1, vocabulary)
            for row, answer in enumerate(chunk):
                for position, said in enumerate([*answer, self._loaded.eos_token_id]):
                    before = tuple(answer[:position])
                    values = logits[row, position, allowed[before]].astype(np.float64)
                    refuse_not_finite(values)
                    yield first + row, before, said, values

    def _forward(self, prepared: PreparedRequest, answers: list[list[int]]) -> torch.Tensor:
        """Logits (n, longest + 1, V) behind the prompt and each answer's tokens, padded on the right."""
        loaded, count, longest = self._loaded, len(answers), max(map(len, answers))
        told = torch.full((count, longest), loaded.eos_token_id)
        seen = torch.zeros((count, longest), dtype=torch.long)
        for row, answer in enumerate(answers):
            told[row, : len(answer)] = torch.tensor(answer)
            seen[row, : len(answer)] = 1
        prompts = prepared.input_ids.expand(count, -1)
        inputs = {
            name: value.repeat(count, *[1] * (value.dim() - 1)) if not name.endswith("token_type_ids") else value
            for name, value in self._place(prepared).items()
        }
        is_suffix = loaded.family.startswith("paligemma")  # for others an answer is of type 0, text
        for name, kind in (("mm_token_type_ids", 0), ("token_type_ids", int(is_suffix))):
            if name in inputs:
                answer_types = inputs[name].new_full((count, longest), kind)
                inputs[name] = torch.cat([inputs[name].expand(count, -1), answer_types], dim=1)
        return loaded.model(
            input_ids=torch.cat([prompts, told], dim=1).to(loaded.device),
            attention_mask=torch.cat([torch.ones_like(prompts), seen], dim=1).to(loaded.device),
            **inputs,
            use_cache=False,
            logits_to_keep=longest + 1,
        ).logits


def _log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values - values.max()
    return shifted - np.log(np.exp(shifted).sum())


def _split_taken_out(prepared: PreparedRequest, allowed: _Allowed) -> dict[tuple[int, ...], np.ndarray]:
    """What has been said -> what the contrast takes from the logits of the tokens allowed there, zeros without one."""
    ends = np.cumsum([len(following) for following in allowed.values()])
    taken_out = find_taken_out(prepared)
    flat = np.zeros(ends[-1]) if taken_out is None else taken_out
    return dict(zip(allowed, np.split(flat, ends[:-1]), strict=True))


def _build_contrast(prepared: PreparedRequest, allowed: _Allowed) -> Callable:
    """A logits processor that takes the blank picture's part out."""
    taken_out, length = _split_taken_out(prepared, allowed), len(prepared.input_ids)

    def subtract(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        said = tuple(input_ids[0, length:].tolist())
        if said in allowed:
            scores[:, allowed[said]] -= torch.as_tensor(taken_out[said], dtype=scores.dtype, device=scores.device)
        return scores

    return subtract


def _check_scores(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    refuse_not_finite(scores.float().cpu().numpy())
    return scores


def build_token_grammar(tokens: Sequence[Sequence[int]]) -> str:
    """Token sequences -> an llguidance grammar in Lark that says these and nothing else.

    One rule for all positions after which the same may follow, so the 729 phrases take 18 or so; its
    terminals are token ids, because a grammar of text would allow every other spelling in tokens.
    """
    allowed = list_allowed(tokens, _END)
    rules: dict[str, str] = {}  # what may follow -> name of its rule

    def name_rule(said: tuple[int, ...]) -> str:
        choices = [f"<[{token}]> {name_rule((*said, token))}" for token in allowed[said] if token != _END]
        body = " | ".join([*choices, '""'] if _END in allowed[said] else choices)
        return rules.setdefault(body, f"after{len(rules)}")

    start = name_rule(())
    # Forcing a token that has no alternative looks it up by its bytes, and fails where two tokens have
    # the same ones, as every single character has in a vocabulary with byte fallback (Gemma's).
    header = '%llguidance {"no_forcing": true}'
    return "\n".join([header, f"start: {start}", *(f"{name}: {body}" for body, name in rules.items())]) + "\n"


def list_allowed(tokens: Sequence[Sequence[int]], end_token: int) -> _Allowed:
    """What has been said -> the token ids that may follow."""
    allowed: dict[tuple[int, ...], dict[int, None]] = {}
    for answer in tokens:
        for position, token in enumerate([*answer, end_token]):
            allowed.setdefault(tuple(answer[:position]), {})[token] = None
    return {said: list(following) for said, following in allowed.items()}


def read_answer(answer: list[int], tokens: list[list[int]], end_token: int) -> int:
    """Generated token ids -> index of the sentence they say; raises EngineError when they say none."""
    if end_token not in answer:
        raise EngineError(f"the answer was cut off after {len(answer)} tokens, before its end")
    said = answer[: answer.index(end_token)]
    if said not in tokens:
        raise EngineError(f"the model left the grammar: it said the tokens {said}")
    return tokens.index(said)
