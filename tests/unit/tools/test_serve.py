"""``moe-scale serve`` as a user starts it, asked by OpenAI's own client and by others with worse manners."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import openai
import pytest

from moe_scale.cli import main
from moe_scale.config import LMConfig
from tests.unit.tools.test_generate import generate, small_run

KEY = "a key"
CONTEXT = 2048


@dataclass(frozen=True)
class Server:
    """A running server."""

    process: subprocess.Popen
    url: str
    run: Path

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=100)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)

    def post(self, data: bytes) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.post(f"{self.url}/v1/completions", content=data, headers=headers, timeout=100)

    def figure(self, name: str) -> int:
        lines = self.get("/metrics").text.splitlines()
        return int(next((line.split()[-1] for line in lines if line.startswith(f"moe_scale_{name} ")), 0))

    def wait_for(self, name: str, value: int) -> None:
        """Until a figure has a value."""
        end = time.monotonic() + 60
        while self.figure(name) != value:
            assert time.monotonic() < end, (name, self.figure(name))
            time.sleep(0.05)


def started(run: Path, *flags: str) -> Server:
    command = [str(Path(sys.executable).with_name("moe-scale")), "serve", "--run", str(run), "--port", "0", *flags]
    environ = os.environ | {"MOE_SCALE_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ)
    assert process.stderr is not None
    line = process.stderr.readline()
    assert f"run with a context of {CONTEXT} tokens at http://127.0.0.1:" in line, line + process.stderr.read()
    return Server(process, line.split()[-1].removesuffix("/v1"), run)


def longer(config: LMConfig) -> LMConfig:
    return replace(config, data=replace(config.data, seq_len=CONTEXT))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("serve")
    small_run(made, "run", longer)
    return made / "run"


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Server]:
    made = started(run, "--max_waiting", "40", "--grace_seconds", "1")
    yield made
    made.process.kill()
    made.process.communicate()


def test_a_run_with_adapters_answers_as_the_command_line_does(tmp_path: Path) -> None:
    def adapted(config: LMConfig) -> LMConfig:
        return replace(longer(config), lora=replace(config.lora, rank=2))

    small_run(tmp_path, "run", adapted)
    server = started(tmp_path / "run")
    try:
        client = server.client()
        found = client.completions.create(model="run", prompt="one two", max_tokens=6, temperature=0)
    finally:
        server.process.kill()
        server.process.communicate()
    text = generate("--run", str(server.run), "--prompt", "one two", "--max_tokens", "6", "--temperature", "0")
    assert found.choices[0].text == text.removesuffix("\n")


def test_the_official_client(server: Server) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["run"]
    assert client.models.retrieve("run").id == "run"
    given = {"model": "run", "prompt": ["one two", "three"], "n": 2, "max_tokens": 6, "seed": 5, "temperature": 0.9}
    whole = client.completions.create(**given)
    assert [(choice.index, choice.finish_reason) for choice in whole.choices] == [(n, "length") for n in range(4)]
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, 24)
    pieces = list(client.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    texts = [""] * 4
    for piece in pieces[:-1]:
        texts[piece.choices[0].index] += piece.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    assert pieces[-1].usage == whole.usage
    assert {piece.id for piece in pieces} == {pieces[0].id}
    argv = ["--prompt", "one two", "--max_tokens", "6", "--seed", "5", "--temperature", "0.9", "--top_k", "0"]
    lines = generate("--run", str(server.run), *argv, "--num_samples", "2").splitlines()
    assert [json.loads(line)["text"] for line in lines] == texts[:2], "as the command line has it"
    more = client.completions.create(
        model="run", prompt="one", max_tokens=2, stop=["zzz"], extra_body={"top_k": 1, "repetition_penalty": 1.1}
    )
    assert more.choices[0].finish_reason == "length"


def test_32_streams_at_once(server: Server) -> None:
    prompts = ["word " * number for number in range(1, 33)]

    def text(prompt: str) -> str:
        stream = server.client().completions.create(
            model="run", prompt=prompt, max_tokens=40, seed=1, temperature=0.8, stream=True
        )
        return "".join(piece.choices[0].text for piece in stream)

    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(text, prompts))
    assert together[::8] == [text(prompt) for prompt in prompts[::8]], "neighbours change nothing"
    assert len(set(together)) == 32
    assert server.figure("sequences_running") == server.figure("sequences_waiting") == 0


def test_what_is_refused(server: Server) -> None:
    client = server.client()
    with pytest.raises(openai.BadRequestError, match="the context holds 2048") as overlong:
        client.completions.create(model="run", prompt="word " * 2100)
    assert overlong.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="this server has 'run'"):
        client.completions.create(model="other", prompt="one")
    with pytest.raises(openai.BadRequestError, match="logprobs is not supported"):
        client.completions.create(model="run", prompt="one", logprobs=2)
    many = {"model": "run", "prompt": ["a"] * 32, "max_tokens": 2000}
    fill = [client.completions.create(**many, stream=True) for _ in range(2)]
    with pytest.raises(openai.RateLimitError, match="try again"):
        client.completions.create(**many)
    for stream in fill:
        stream.close()
    for data, status in [(b"", 400), (b"{", 400), (b'{"model": 3}', 400), (b"\xff", 400), (b" " * 2**21, 413)]:
        answer = server.post(data)
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")
    for key in ("x", "another key", KEY[:-1]):
        with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            server.client(key).completions.create(model="run", prompt="one")
    assert httpx.get(server.url + "/metrics").status_code == 401
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}
    assert server.get("/v1/nothing").status_code == 404
    assert server.get("/v1/completions").status_code == 405
    server.wait_for("sequences_running", 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_takes_its_texts_with_it(stream: bool, server: Server) -> None:
    server.wait_for("sequences_running", 0)
    body = json.dumps({"model": "run", "prompt": ["a", "b"], "max_tokens": 2000, "stream": stream, "temperature": 0})
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}\r\n\r\n{body}".encode())
        server.wait_for("sequences_running", 2)
        drawn = server.figure("generated_tokens_total")
    server.wait_for("sequences_running", 0)
    assert server.figure("generated_tokens_total") - drawn < 3000, "it did not go on to their ends"
    assert server.client().completions.create(model="run", prompt="one", max_tokens=2).choices[0].text


def test_sigterm_lets_what_runs_end(run: Path) -> None:
    server = started(run, "--grace_seconds", "100")
    stream = server.client().completions.create(model="run", prompt="a", max_tokens=100, stream=True, temperature=1.5)
    next(iter(stream))
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    with pytest.raises(openai.APIConnectionError):
        server.client().completions.create(model="run", prompt="one")
    assert [piece.choices[0].finish_reason for piece in stream][-1] in ("length", "stop")
    _, err = server.process.communicate(timeout=60)
    assert (server.process.returncode, err) == (0, "")


def test_a_second_signal_does_not_wait(run: Path) -> None:
    ends_by_force(started(run, "--grace_seconds", "1000"), signals=2)


def test_bad_options(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for flags, what in (
            (["--port", str(taken.getsockname()[1])], "cannot listen at 127.0.0.1"),
            (["--port", "80"], "choose 1024 or more"),
            (["--host", "no.such.host.invalid"], "cannot listen at no.such.host.invalid"),
            (["--api_key_file", str(tmp_path / "empty")], "is empty"),
            (["--api_key_file", str(tmp_path / "none")], "cannot read"),
            (["--max_batch", "0"], "choose 1 or more"),
            (["--port", "0", "--run", str(tmp_path / "none")], "none"),
        ):
            with pytest.raises(SystemExit) as left:
                main(["serve", "--run", str(run), *flags])
            assert left.value.code == 2
            assert what in capsys.readouterr().err


def test_packages_that_are_missing_are_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "moe_scale.serve.app", raising=False)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    with pytest.raises(SystemExit) as left:
        main(["serve", "--run", str(run), "--port", "0"])
    assert left.value.code == 2
    assert 'starlette.applications is not installed; pip install -e ".[serve]"' in capsys.readouterr().err


def test_the_end_of_grace(server: Server) -> None:
    """The last of these tests, as it ends the server that the others use."""
    ends_by_force(server, signals=1)


def ends_by_force(server: Server, signals: int) -> None:
    """Stop it while it is busy, and its client is told."""
    stream = server.client().completions.create(model="run", prompt=["a"] * 30, max_tokens=2000, stream=True)
    next(iter(stream))
    for _ in range(signals):
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    with pytest.raises(openai.APIError, match="the server is stopping"):
        list(stream)
    _, err = server.process.communicate(timeout=60)
    assert (server.process.returncode, err) == (0, "")
