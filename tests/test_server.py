"""`vllm serve MODEL --kv-cache-dtype kivi2`: clients that stream, leave or send nonsense, and processes that die."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from processes import PATIENCE, START, assert_gone, environment, family, kill, terminate, until

SMOLLM2 = Path(__file__).parent.parent / "models" / "smollm2"
TEXT = Path(__file__).parent / "data" / "persuasion.txt"
# Chunks of a prompt end where prefix hits do, every 96 tokens. So an answer is the same to the bit whether its prompt
# is computed, or found in the prefix cache, whoever left it there.
CHUNK, LONGEST = 96, 1024
SETTINGS = {
    "--kv-cache-dtype": "kivi2",
    "--served-model-name": "smollm2",
    "--host": "127.0.0.1",
    "--max-model-len": LONGEST,
    "--max-num-batched-tokens": CHUNK,
    "--max-num-seqs": 16,
    "--kv-cache-memory-bytes": 256 << 20,
    "--num-gpu-blocks-override": 140,  # two requests of LONGEST tokens and a bit
}
PROMPT_TOKENS = 700
IDLE = dict.fromkeys(("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "kivi_cached_tokens"), 0.0)
CHAT = "/v1/chat/completions"


class Server:
    """A server on a free port, and what its clients do."""

    def __init__(self, log: Path, *more: str, **changes: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [str(Path(sys.executable).parent / "vllm"), "serve", str(SMOLLM2), "--port", str(self.port)]
        command += ["--enforce-eager", "--enable-prompt-tokens-details"]
        command += [*(str(word) for setting in SETTINGS.items() for word in setting), *more]
        with log.open("w") as out:
            self.process = subprocess.Popen(command, env=environment(**changes), stdout=out, stderr=subprocess.STDOUT)
        self.log = log

    def healthy(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2).close()
        except OSError:
            return False
        return True

    def post(self, body: Any, path: str = "/v1/completions", **headers: str) -> http.client.HTTPConnection:
        """A request on its way; a client that leaves before it is answered closes this."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers |= {"Content-Type": "application/json", "Connection": "close"}
        connection.request("POST", path, data, headers)
        return connection

    def ask(self, ids: list[int], salt: str, **headers: str) -> tuple[list[int], list[float], int]:
        """Tokens of a greedy answer, their logprobs, and how much of the prompt was found in the prefix cache."""
        with self.post(completion(ids, salt, logprobs=0), **headers).getresponse() as response:
            answer = json.load(response)
        assert response.status == 200, answer
        (choice,) = answer["choices"]
        details = answer["usage"]["prompt_tokens_details"] or {}
        return choice["token_ids"], choice["logprobs"]["token_logprobs"], details.get("cached_tokens", 0)

    def metrics(self) -> dict[str, float]:
        """vLLM's own and ours by name, all engines together; those of finished requests also by reason."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=PATIENCE) as response:
            lines = response.read().decode().splitlines()
        found: dict[str, float] = {}
        for line in lines:
            if line.startswith("vllm:"):
                name, labels = line.removeprefix("vllm:").split("{", 1)
                reason = labels.partition('finished_reason="')[2].partition('"')[0]
                name = f"{name} {reason}".rstrip()
                found[name] = found.get(name, 0) + float(line.rsplit(" ", 1)[1])
        return found

    def idle(self) -> bool:
        metrics = self.metrics()
        return {name: metrics[name] for name in IDLE} == IDLE


def completion(ids: list[int], salt: str, max_tokens: int = 8, **settings: Any) -> dict[str, Any]:
    """Only requests with the same salt find one another's pages."""
    greedy = {"model": "smollm2", "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return greedy | {"prompt": ids, "cache_salt": salt, "max_tokens": max_tokens} | settings


@contextmanager
def serving(log: Path, *more: str, **changes: str) -> Iterator[Server]:
    running = Server(log, *more, **changes)
    try:
        until(running.healthy, "the server", START)
        yield running
    finally:
        terminate(running.process)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.fixture(scope="module")
def ids(server: Server) -> list[int]:
    text = TEXT.read_text(encoding="utf-8")[20000:26000]
    with server.post({"model": "smollm2", "prompt": text}, "/tokenize").getresponse() as response:
        return json.load(response)["tokens"][:PROMPT_TOKENS]


@pytest.fixture(scope="module")
def answer(server: Server, ids: list[int]) -> tuple[list[int], list[float]]:
    """Tokens and logprobs before anything goes wrong."""
    tokens, logprobs, cached = server.ask(ids, "before all faults")
    assert len(tokens) == 8 and cached == 0
    return tokens, logprobs


def test_a_chat_streams(server):
    from openai import OpenAI

    client = OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    stream = client.chat.completions.create(
        model="smollm2", messages=question, temperature=0, max_tokens=16, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(pieces) > 4 and "Paris" in "".join(pieces)


def test_a_client_that_leaves_in_the_middle_of_its_prompt(server, ids, answer):
    before = server.metrics()
    client = server.post(completion(ids, "prompt", 300, stream=True))
    cached = until(lambda: server.metrics()["kivi_cached_tokens"], "the first chunk")
    client.close()
    assert cached < PROMPT_TOKENS
    until(server.idle, "its pages")
    after = server.metrics()
    for name in ("generation_tokens_total", "request_success_total length"):
        assert after[name] == before[name]
    *again, _ = server.ask(ids, "prompt")
    assert tuple(again) == answer


def test_a_client_that_leaves_in_the_middle_of_its_answer(server, ids, answer):
    """Its prompt stays in the prefix cache, as good as that of a request that ended."""
    before = server.metrics()
    response = server.post(completion(ids, "answer", 300, stream=True)).getresponse()
    for _ in range(8):  # with an empty line after each
        assert response.readline().startswith((b"data: {", b"\n"))
    assert server.metrics()["num_requests_running"] == 1
    response.close()
    until(server.idle, "its pages")
    after = server.metrics()
    assert after["request_success_total length"] == before["request_success_total length"]
    assert 4 <= after["generation_tokens_total"] - before["generation_tokens_total"] < 300
    *again, cached = server.ask(ids, "answer")
    assert tuple(again) == answer
    assert cached == PROMPT_TOKENS // CHUNK * CHUNK


def test_a_crowd_that_leaves_at_once(server, ids, answer):
    """More requests than the pool holds: some run, some wait, some have lost their pages to others."""
    before = server.metrics()
    clients = [server.post(completion(ids[i : i + 60], "crowd", 300, stream=i % 2 == 0)) for i in range(14)]

    def crowded() -> bool:
        now = server.metrics()
        preempted = now["num_preemptions_total"] > before["num_preemptions_total"]
        return preempted and now["num_requests_running"] >= 2 and now["num_requests_waiting"] >= 2

    until(crowded, "requests that run, wait and are preempted")
    for client in clients:
        client.close()
    until(server.idle, "their pages")
    assert server.metrics()["request_success_total length"] == before["request_success_total length"]
    *again, cached = server.ask(ids, "after the crowd")
    assert tuple(again) == answer and cached == 0


def test_requests_that_make_no_sense(server, ids, answer):
    """vLLM refuses each with a status and a word that says why, and goes on."""
    good = completion([1, 2, 3], "nonsense")
    chat = {"model": "smollm2", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    cases: dict[str, tuple[Any, str, int, str]] = {
        "prompt too long": (good | {"prompt": [5] * (LONGEST + 1)}, "", 400, "maximum context length"),
        "no room for an answer": (good | {"prompt": [5] * LONGEST}, "", 400, "max_tokens"),
        "text too long": (good | {"prompt": "word " * 5000}, "", 400, "maximum context length"),
        "empty prompt": (good | {"prompt": ""}, "", 400, "prompt"),
        "no tokens": (good | {"prompt": [[]]}, "", 400, "prompt"),
        "token out of the vocabulary": (good | {"prompt": [1, 49152]}, "", 400, "vocabulary"),
        "huge token": (good | {"prompt": [1, 10**12]}, "", 400, "vocabulary"),
        "negative token": (good | {"prompt": [1, -1]}, "", 400, "greater than or equal to 0"),
        "prompt that is a number": (good | {"prompt": 7}, "", 400, "prompt"),
        "max_tokens below 0": (good | {"max_tokens": -1}, "", 400, "max_tokens"),
        "max_tokens too large": (good | {"max_tokens": 10**30}, "", 400, "max_tokens"),
        "max_tokens in words": (good | {"max_tokens": "many"}, "", 400, "max_tokens"),
        "temperature NaN": (good | {"temperature": float("nan")}, "", 400, "temperature"),
        "temperature below 0": (good | {"temperature": -1}, "", 400, "temperature"),
        "no answers": (good | {"n": 0}, "", 400, "n must be"),
        "bias of an unknown token": (good | {"logit_bias": {"99999": 1}}, "", 400, "vocab"),
        "unknown model": (good | {"model": "other"}, "", 404, "does not exist"),
        "half a JSON": (b'{"model": "smollm2", "prompt": ', "", 400, "JSON"),
        "no JSON": (b"\xff\xfe\x00", "", 400, "body"),
        "no object": ([1, 2], "", 400, "object"),
        "no body": (b"", "", 400, "body"),
        "no messages": (chat | {"messages": []}, CHAT, 400, "empty"),
        "messages of a wrong type": (chat | {"messages": "Hello"}, CHAT, 400, "messages"),
        "chat too long": (chat | {"messages": [{"role": "user", "content": "word " * 5000}]}, CHAT, 400, "length"),
    }
    wrong = {}
    for name, (body, path, status, word) in cases.items():
        with server.post(body, path or "/v1/completions").getresponse() as response:
            text = response.read().decode()
        if response.status != status or word not in text:
            wrong[name] = (response.status, text[:200])
    assert not wrong
    # A client that leaves before its request is complete gets nothing, and needs nothing.
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    for sent in (head + b'{"model": "smollm2", ', head, head[:20]):
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as half:
            half.sendall(sent)
            half.shutdown(socket.SHUT_WR)
            assert half.recv(1000) == b""
    assert server.idle()
    *again, cached = server.ask(ids, "after the nonsense")
    assert tuple(again) == answer and cached == 0


def test_data_parallel_engines_answer_as_one_does(server, ids, answer, tmp_path):
    """Each has a pool of its own, and reports it."""
    capacity = server.metrics()["kivi_capacity_tokens"]
    tokens, logprobs = answer
    parallel = ("--data-parallel-size", "2", "--api-server-count", "1")
    with serving(tmp_path / "log", *parallel, VLLM_CPU_OMP_THREADS_BIND="0|1") as both:
        for rank in "01":
            for hit in (0, PROMPT_TOKENS // CHUNK * CHUNK):
                *again, cached = both.ask(ids, "parallel", **{"X-data-parallel-rank": rank})
                assert again[0] == tokens and cached == hit
                # Engines on one core each add up in another order.
                assert again[1] == pytest.approx(logprobs, abs=2e-2)
        until(both.idle, "what the last step reports")
        assert both.metrics()["kivi_capacity_tokens"] == 2 * capacity


def test_a_killed_engine_ends_its_server(server, ids):
    """The last test: it takes the server of all others with it."""
    response = server.post(completion(ids, "killed", 300, stream=True)).getresponse()
    assert response.readline().startswith(b"data: {")
    processes = family(server.process)
    kill(processes, "VLLM::EngineCore")
    assert b'"code": 500' in response.read()
    assert_gone(server.process, processes)
    assert "EngineDeadError" in server.log.read_text()
