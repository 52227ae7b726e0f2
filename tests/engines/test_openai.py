"""The engine behind an API, against a server in this process that behaves and misbehaves like real ones."""

import subprocess
import sys
import time

import numpy as np
import pytest

from tests.engines.fake_server import FakeServer, weigh_sentences
from vlm_local.engines.openai import OpenAIEngine
from vlm_local.engines.remote import build_messages, encode_image
from vlm_local.engines.worker import EngineWorker
from vlm_local.errors import ConfigError, EngineError, RemoteError
from vlm_local.grammar import load_grammar
from vlm_local.types import GenerationRequest, Prompt

SENTENCES = load_grammar("primitives_no_rotation").sentences
PROMPT = Prompt("Move the arm.", "Which way?", "chat")


@pytest.fixture
def open_engine():
    engines = []

    def open_(*servers, **options):
        urls = [server if isinstance(server, str) else server.url for server in servers]
        engines.append(OpenAIEngine(urls, "tiny", **options))
        return engines[-1]

    yield open_
    for engine in engines:
        engine.close()


@pytest.fixture
def server():
    with FakeServer() as fake:
        yield fake


def build_request(seed=0, sentences=SENTENCES, robot="robot", side=16, **options):
    image = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return GenerationRequest(image, PROMPT, sentences, episode=f"{robot}/1", **options)


def ask(engine, **options):
    (outcome,) = engine.generate([build_request(**options)])
    return outcome


# --- what the server obeys ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dialect"),
    [("vllm", "vllm-choice"), ("sglang", "sglang-regex"), ("llama", "llama-grammar"), ("hosted", "json-schema")],
)
def test_the_dialect_that_a_server_obeys_is_found(open_engine, kind, dialect):
    with FakeServer(kind) as server:
        engine = open_engine(server)
        assert engine.metadata["servers"][0]["dialect"] == dialect
        assert ask(engine).sentence in SENTENCES


@pytest.mark.parametrize(
    ("kind", "dialect"),
    [("vllm", "vllm-regex"), ("vllm", "vllm-grammar"), ("vllm", "vllm-json"), ("sglang", "sglang-ebnf")],
)
def test_every_dialect_carries_awkward_choices(open_engine, kind, dialect):
    choices = ("a.b", "a|b (c)", 'say "yes"', "back\\slash", "50 %+", "größe")
    with FakeServer(kind) as server:
        engine = open_engine(server, dialect=dialect)
        said = {ask(engine, seed=seed, sentences=choices).sentence for seed in range(12)}
        assert said <= set(choices) and len(said) > 1


@pytest.mark.parametrize(("kind", "habit"), [("deaf", ""), ("vllm", "ignores"), ("vllm", "html")])
def test_a_server_that_ignores_constraints_is_refused(kind, habit):
    with FakeServer(kind) as server:
        server.habit = habit
        with pytest.raises(ConfigError, match="does not keep to a list of allowed answers"):
            OpenAIEngine([server.url], "tiny")


def test_a_model_the_server_does_not_have_is_named_beside_those_it_has(server):
    with pytest.raises(ConfigError, match="no model 'large'; --model can be tiny"):
        OpenAIEngine([server.url], "large")


def test_the_question_keeps_its_fixed_text_first_and_its_choices_in_order(open_engine, server):
    engine = open_engine(server)
    for seed in range(2):
        ask(engine, seed=seed)
    first, second = server.bodies[-2:]
    assert [part["type"] for part in first["messages"][0]["content"]] == ["text", "image_url", "text"]
    assert first["messages"][0]["content"][0]["text"] == PROMPT.before + "\n"
    assert first["structured_outputs"] == second["structured_outputs"] == {"choice": list(SENTENCES)}
    assert first["temperature"] == 0


def test_the_picture_crosses_without_loss():
    import base64
    from io import BytesIO

    from PIL import Image

    image = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    data = encode_image(image).partition(",")[2]
    assert (np.asarray(Image.open(BytesIO(base64.b64decode(data)))) == image).all()
    assert len(build_messages(Prompt("", "Which way?", "x"), "data:")[0]["content"]) == 2


def test_control_tokens_in_a_users_words_become_plain_words():
    messages = build_messages(Prompt("Task: <|im_end|> stop", "<image> a < b", "x"), "data:")
    assert [part["text"] for part in messages[0]["content"] if "text" in part] == [
        "Task: im_end stop\n",
        "\nimage a < b",
    ]


def test_keys_go_to_the_server_and_nowhere_else(open_engine, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    told = str(open_engine(server).metadata)
    assert server.keys[-1] == "Bearer secret-key"
    told += str(open_engine(server.url.replace("//", "//someone:secret-word@")).metadata)
    assert server.keys[-1].startswith("Basic ") and "secret" not in told


# --- what its log-probabilities say ---------------------------------------------------------------


@pytest.mark.parametrize("choices", [("yes", "no"), ("sink", "basket", "invalid")])
def test_probabilities_of_short_answers_are_exact(open_engine, server, choices):
    engine = open_engine(server)
    for seed in range(5):
        request = build_request(seed, choices)
        (answer,) = engine.generate([request])
        expected = weigh_sentences(encode_image(request.image), choices)
        assert answer.probabilities == pytest.approx(expected)
        assert answer.missing_mass == pytest.approx(0, abs=1e-9)
        assert answer.sentence == choices[expected.argmax()]


@pytest.mark.parametrize("habit", ["", "no_end"])
def test_probabilities_of_phrases_are_lower_bounds(open_engine, server, habit):
    server.habit = habit
    engine = open_engine(server)
    for seed in range(5):
        request = build_request(seed)
        (answer,) = engine.generate([request])
        expected = weigh_sentences(encode_image(request.image), SENTENCES)
        assert (answer.probabilities <= expected + 1e-9).all()
        assert answer.missing_mass == pytest.approx(1 - answer.probabilities.sum())
        if not habit:
            said = SENTENCES.index(answer.sentence)
            assert answer.probabilities[said] == pytest.approx(expected[said])


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_a_draw_is_the_inverse_cdf_at_the_seed(open_engine, server, temperature):
    engine = open_engine(server)
    uniforms = np.random.default_rng(1).random(12)
    questions = 0
    for seed, uniform in enumerate(uniforms):
        request = build_request(seed, decide="sample", uniform=float(uniform), temperature=temperature)
        (answer,) = engine.generate([request])
        cdf = weigh_sentences(encode_image(request.image), SENTENCES, temperature).cumsum()
        assert answer.sentence == SENTENCES[int(np.searchsorted(cdf, uniform, side="right"))]
        questions += answer.stats["questions"]
    assert questions > len(uniforms)  # some draws had to ask again


@pytest.mark.parametrize("habit", ["no_logprobs", "raw_logprobs", "refuses_logprobs"])
def test_without_usable_logprobs_there_is_no_probability_and_no_draw(open_engine, server, habit):
    server.habit = habit
    engine = open_engine(server)
    answer = ask(engine)
    assert answer.sentence in SENTENCES and answer.probabilities is None
    assert "not given" in engine.metadata["about_probability"]
    with pytest.raises(ConfigError, match="--decide greedy"):
        engine.check("sample", "off")
    assert isinstance(ask(engine, decide="sample", uniform=0.5), EngineError)


def test_the_likeliest_phrase_is_the_exact_one(open_engine, server):
    engine = open_engine(server)
    said = []
    for seed in range(12):
        request = build_request(seed, decide="map")
        (answer,) = engine.generate([request])
        assert answer.sentence == SENTENCES[weigh_sentences(encode_image(request.image), SENTENCES).argmax()]
        said.append(answer.sentence == ask(engine, seed=seed).sentence)
    assert not all(said)  # greedy is another thing


def test_the_exact_posterior_is_refused(open_engine, server):
    with pytest.raises(ConfigError, match="so use fast"):
        open_engine(server).check("greedy", "exact")


def test_json_with_spaces_is_read(open_engine):
    with FakeServer("hosted") as server:
        server.habit = "spaces"
        answer = ask(open_engine(server))
        assert answer.sentence in SENTENCES and answer.probabilities is None


# --- how it fails ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("habit", "kind", "words"),
    [
        ("401", "unauthorized", "OPENAI_API_KEY"),
        ("404", "not_found", "--model"),
        ("429", "rate_limited", "429"),
        ("500", "server_error", "500"),
        ("drops", "connection", "cannot be reached"),
        ("html", "malformed", "no chat completion"),
        ("leaves", "outside_grammar", "fly away"),
        ("truncates", "truncated", "finish_reason 'length'"),
        ("too_many", "refused", "Enum has more values"),
    ],
)
def test_each_failure_has_its_own_error_and_counter(open_engine, server, habit, kind, words):
    engine = open_engine(server)
    ask(engine)
    server.habit = habit
    before = len(server.bodies)
    outcome = ask(engine, side=100)
    assert isinstance(outcome, RemoteError) and outcome.kind == kind and words in str(outcome)
    tries = 2 if kind in ("connection", "server_error") else 1
    assert engine.counters[kind] == len(server.bodies) - before == tries
    server.habit = ""
    assert ask(engine).sentence in SENTENCES


@pytest.mark.parametrize("habit", ["slow", "drips"])
def test_the_deadline_holds_and_nothing_is_asked_after_it(open_engine, server, habit):
    engine = open_engine(server, deadline_ms=150)
    ask(engine)
    server.habit, server.slow_s = habit, 4.0 if habit == "slow" else 0.0
    before, start = len(server.bodies), time.perf_counter()
    outcome = ask(engine)
    assert time.perf_counter() - start < 2
    assert isinstance(outcome, RemoteError) and outcome.kind == "timeout"
    server.habit, server.slow_s = "", 0.0
    time.sleep(0.3)
    assert len(server.bodies) - before <= 1
    assert engine.counters["timeout"] == 1


def test_one_dropped_connection_costs_one_retry_and_no_fault(open_engine, server):
    engine = open_engine(server)
    ask(engine)
    server.habit = "drops_once"
    assert ask(engine).sentence in SENTENCES
    assert engine.counters["retries"] == engine.counters["connection"] == 1


def test_a_failed_request_spoils_no_other_and_is_asked_once(open_engine, server):
    worker = EngineWorker(lambda: open_engine(server))
    worker.wait_loaded()
    server.habit = "too_many"
    try:
        engine = open_engine(server)
        outcomes = engine.generate([build_request(0), build_request(1, side=100), build_request(2)])
        assert [isinstance(outcome, RemoteError) for outcome in outcomes] == [False, True, False]
        before = server.num_asked
        with pytest.raises(RemoteError, match="Enum has more values"):
            worker.generate(build_request(3, side=100))
        assert server.num_asked - before == 1
    finally:
        worker.close()


def test_requests_of_a_batch_travel_together(open_engine, server):
    engine = open_engine(server)
    ask(engine)
    server.slow_s = 1.0  # longer than a busy machine takes to send eight
    outcomes = engine.generate([build_request(seed) for seed in range(8)])
    assert server.most_at_once == 8
    server.slow_s = 0.0
    alone = [ask(engine, seed=seed).sentence for seed in range(2)]
    assert [outcome.sentence for outcome in outcomes[:2]] == alone


# --- several servers ------------------------------------------------------------------------------


def count_asked(servers):
    return [server.num_asked for server in servers]


def test_robots_are_dealt_out_evenly_and_stay(open_engine):
    with FakeServer() as one, FakeServer() as two:
        engine = open_engine(one, two)
        for seed in range(3):
            engine.generate([build_request(seed, robot=robot) for robot in "abcd"])
        assert count_asked([one, two]) == [6, 6]
        ask(engine, robot="a")
        assert count_asked([one, two]) == [7, 6]


def test_a_robot_moves_when_its_server_dies_and_comes_back_with_it(open_engine):
    with FakeServer() as one, FakeServer() as two:
        engine = open_engine(one, two)
        assert ask(engine, robot="a").sentence in SENTENCES
        port = one.port
        one.close()
        for seed in range(3):
            assert ask(engine, seed=seed, robot="a").sentence in SENTENCES
        assert two.num_asked == 3 and engine.counters["retries"] == 1
        assert [server["up"] for server in engine.metadata["servers"]] == [False, True]
        with FakeServer(port=port) as back:
            end = time.monotonic() + 10
            while not engine.metadata["servers"][0]["up"] and time.monotonic() < end:
                time.sleep(0.05)
            ask(engine, robot="a")
            assert (back.num_asked, two.num_asked) == (1, 3)
            compiled = [body["structured_outputs"]["choice"] for body in back.bodies]
            assert compiled.count(list(SENTENCES)) == 2  # before the robot's question, and it


@pytest.mark.parametrize("habit", ["401", "500", "drops", "leaves", "truncates", "html"])
def test_a_server_that_misbehaves_is_left_for_the_other_within_the_step(open_engine, habit):
    with FakeServer() as one, FakeServer() as two:
        engine = open_engine(one, two)
        ask(engine, robot="a")
        one.habit = habit
        assert ask(engine, robot="a").sentence in SENTENCES
        assert count_asked([one, two]) == [2, 1]


def test_a_full_server_is_not_a_dead_one(open_engine):
    with FakeServer() as one, FakeServer() as two:
        engine = open_engine(one, two)
        one.habit = "429"
        assert ask(engine, robot="a").sentence in SENTENCES
        assert [server["up"] for server in engine.metadata["servers"]] == [True, True]


def test_a_server_that_comes_back_deaf_stays_out(open_engine):
    with FakeServer() as one, FakeServer() as two:
        engine = open_engine(one, two)
        one.habit = "drops"
        ask(engine, robot="a")
        one.habit = "ignores"
        time.sleep(1.5)
        assert [server["up"] for server in engine.metadata["servers"]] == [False, True]


def test_one_of_two_servers_may_be_away_at_the_start(open_engine, server):
    engine = open_engine("http://127.0.0.1:9", server)
    assert ask(engine, robot="a").sentence in SENTENCES
    with pytest.raises(RemoteError, match="is the server running"):
        OpenAIEngine(["http://127.0.0.1:9"], "tiny")


@pytest.mark.parametrize("urls", [[], ["ftp://host"], ["http://"]])
def test_a_wrong_url_is_refused(urls):
    with pytest.raises(ConfigError, match="engine-url"):
        OpenAIEngine(urls, "tiny")


def test_without_the_package_one_sentence_says_what_to_install():
    code = "import sys; sys.modules['openai'] = None; import vlm_local.engines.openai"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'vlm-local[openai]'" in done.stderr.splitlines()[-1]
