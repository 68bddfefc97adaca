"""``moe-scale generate`` on a small stored run."""

from __future__ import annotations

import io
import json
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moe_scale.checkpoint.reader import load_model
from moe_scale.cli import main
from moe_scale.config import LMConfig
from moe_scale.data.tokenizer import load_tokenizer
from moe_scale.generate.full_passes import sample_ids
from tests.ranks import REPO
from tests.unit.checkpoint.builders import small_config, write_checkpoint


def small_run(folder: Path, name: str, change: Callable[[LMConfig], LMConfig] = lambda config: config) -> None:
    config = small_config(folder)
    config = replace(config, model=replace(config.model, vocab_size=50304), data=replace(config.data, seq_len=32))
    write_checkpoint(folder / name, change(config))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On tiny tensors more threads cost several times what they compute, most so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("generate")

    def moe(**changes: object) -> Callable[[LMConfig], LMConfig]:
        return lambda config: replace(config, moe=replace(config.moe, **changes))  # type: ignore[arg-type]

    small_run(made, "run")
    small_run(made, "capacity", moe(dispatch="capacity", eval_capacity_factor=0.01, min_capacity=1))
    small_run(made, "choice", moe(router="expert_choice", dispatch="capacity"))
    small_run(made, "vocabulary", lambda config: replace(config, model=replace(config.model, vocab_size=64)))
    return made


class Terminal(io.StringIO):
    """Standard output that counts what is written to it."""

    def __init__(self, terminal: bool = True):
        super().__init__()
        self.terminal, self.pieces = terminal, []  # type: ignore[var-annotated]

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str, /) -> int:
        self.pieces.append(text)
        return super().write(text)


def generate(*argv: str, given: bytes = b"", out: io.StringIO | None = None) -> str:
    """Standard output of ``moe-scale generate`` in this process."""
    out = out or io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(given)))
        patch.setattr(sys, "stdout", out)
        main(["generate", *argv])
    return out.getvalue()


def test_it_is_what_the_model_gives_without_a_cache(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, tokenizer = str(folder / "run"), load_tokenizer("gpt2")
    model = load_model(folder / "run")
    ids = sample_ids(
        partial(model, last_only=True),
        tokenizer,
        [tokenizer.eot_id, *tokenizer.encode("ROMEO.\n")],
        num_tokens=12,
        window=32,
        seed=4,
        device=torch.device("cpu"),
    )
    found = generate("--run", run, "--prompt", "ROMEO.\n", "--max_tokens", "12", "--seed", "4")
    assert found == tokenizer.decode(ids) + "\n"
    assert "1 text, 12 tokens in" in capsys.readouterr().err


def test_streamed_is_whole(folder: Path) -> None:
    argv = ["--run", str(folder / "run"), "--prompt", "one", "--max_tokens", "20"]
    whole = generate(*argv)
    stream, shown, piped = Terminal(), Terminal(), Terminal(terminal=False)
    assert generate(*argv, out=stream) == generate(*argv, "--no_stream", out=shown) == generate(*argv, out=piped)
    assert stream.getvalue() == whole
    assert len(stream.pieces) > 10
    assert shown.pieces == piped.pieces == [whole[:-1], "\n"]


def test_many_prompts_and_samples_are_lines_in_their_order(folder: Path, tmp_path: Path) -> None:
    argv = ["--run", str(folder / "run"), "--max_tokens", "9", "--num_samples", "2", "--top_p", "0.9", "--top_k", "0"]
    prompts = ["first", "a second, longer one", "first", "ünï"]
    given = "\ufeff" + "\n\n".join(prompts) + "\r\n"
    lines = generate(*argv, "--batch_size", "3", given=given.encode())
    found = [json.loads(line) for line in lines.splitlines()]
    assert [line["prompt"] for line in found] == [prompt for prompt in prompts for _ in range(2)]
    assert all((line["tokens"], line["finish_reason"]) == (9, "length") for line in found)
    assert found[0]["text"] != found[1]["text"], "samples differ"
    assert found[0] == found[4], "a prompt's texts are its own, wherever it stands"
    (tmp_path / "in.txt").write_text("\n".join(prompts))
    generate(*argv, "--prompts", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.jsonl"))
    assert (tmp_path / "out.jsonl").read_text() == lines, "whatever the size of the batch"
    assert [json.loads(generate(*argv, "--prompt", p).splitlines()[0])["text"] for p in prompts] == [
        line["text"] for line in found[::2]
    ]
    other = json.loads(generate(*argv, "--prompt", "first", "--seed", "1").splitlines()[0])
    assert other["text"] != found[0]["text"]


def test_stop_and_context(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["--run", str(folder / "run"), "--prompt", "one two", "--temperature", "0", "--max_tokens", "200"]

    def line(*more: str) -> dict:
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        generate(*argv, *more, "--output", str(output))
        return json.loads(output.read_text())

    whole = line()
    assert (whole["tokens"], whole["finish_reason"]) == (29, "length"), "32 with the prompt and what begins it"
    assert "1 of them reached the context of 32 tokens" in capsys.readouterr().err
    stop = whole["text"][20:26]
    stopped = line("--stop", "not there", "--stop", stop)
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == whole["text"][: whole["text"].index(stop)]
    assert line("--context", "50")["tokens"] == 47
    assert line("--max_tokens", "3")["tokens"] == 3
    penalized = line("--repetition_penalty", "1e9")
    ids = load_tokenizer("gpt2").encode(penalized["text"])
    assert len(set(ids)) >= len(ids) - 2, "a drawn token hardly comes again"


def test_experts_are_dropless_whatever_the_run_had(folder: Path) -> None:
    argv = ["--prompt", "one two three four five", "--prompt", "six", "--max_tokens", "8"]
    texts = generate("--run", str(folder / "run"), *argv)
    assert generate("--run", str(folder / "capacity"), *argv) == texts


@pytest.mark.parametrize(
    ("argv", "given", "what"),
    [
        ([], b"", "no prompt in standard input"),
        ([], b"one\n\xff\n", "line 2: not UTF-8"),
        (["--prompts", "nowhere.txt"], b"", "cannot read nowhere.txt"),
        (["--prompts", "x", "--prompt", "y"], b"", "given beside --prompt"),
        (["--prompt", "t\udcffwo"], b"", "is not UTF-8"),
        (["--prompt", "x", "--output", "small.yaml"], b"", "small.yaml exists"),
        (["--prompt", "x", "--output", "nowhere/x"], b"", "does not exist"),
        (["--prompt", "x", "--output", "/proc/texts"], b"", "cannot be written"),
        (["--prompt", "x", "--stop", ""], b"", "--stop: is empty"),
        (["--prompt", "x", "--temperature", "0", "--num_samples", "3"], b"", "choose 1, or a temperature above 0"),
        (["--prompt", "x", "--temperature", "nan"], b"", "choose a number from 0"),
        (["--prompt", "x", "--top_p", "0"], b"", "choose a number above 0, up to 1"),
        (["--prompt", "x", "--top_p", "1.1"], b"", "choose a number above 0, up to 1"),
        (["--prompt", "x", "--repetition_penalty", "0"], b"", "choose a number above 0"),
        (["--prompt", "x", "--max_tokens", "0"], b"", "choose 1 or more"),
        (["--prompt", "x", "--device", "abacus"], b"", "'abacus' is not there; choose auto or cpu"),
        (["--prompt", "x", "--prompt", "one " * 31], b"", "prompt 2: 33 tokens"),
        (["--prompt", "one two", "--context", "3"], b"", "shorten it to 2 tokens"),
        (["--prompt", "x", "--run", "nowhere"], b"", "nowhere"),
        (["--prompt", "x", "--run", "choice"], b"", "experts look at later tokens"),
        (["--prompt", "x", "--run", "vocabulary"], b"", "gpt2 has 50257 tokens, the model 64"),
    ],
)
def test_what_is_refused(
    argv: list[str], given: bytes, what: str, folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as left:
        generate("--run", "run", *argv, given=given)
    assert left.value.code == 2
    assert what in capsys.readouterr().err


def test_the_benchmark_of_the_cache(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--prompt_tokens", "3", "--tokens", "2", "5", "--batch_sizes", "3", "--rounds", "1", "--cpu_seconds"]
    monkeypatch.setattr(sys, "argv", ["generation.py", "--run", str(folder / "run"), *small])
    runpy.run_path(str(REPO / "benchmarks" / "generation.py"), run_name="__main__")
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "| tokens drawn | no cache | cache | ratio | 3 texts |"
    assert [row.split()[1] for row in rows] == ["2", "5"]
    assert all(float(figure) > 0 for row in rows for figure in row.split()[1::2])


def test_the_command_line_runs(folder: Path) -> None:
    """As a user starts it; a reader that leaves early, as `head` does, is no error of ours to tell of."""
    command = [str(Path(sys.executable).with_name("moe-scale")), "generate", "--run", str(folder / "run")]
    done = subprocess.run(command, input="one\ntwo\n", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 2
    with subprocess.Popen(
        [*command, "--batch_size", "1", *["--prompt", "one"] * 3000], stdout=-1, stderr=-1
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert (process.wait(timeout=120), process.stderr.read()) == (128 + signal.SIGPIPE, b"")
