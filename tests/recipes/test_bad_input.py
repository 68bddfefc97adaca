"""Wrong input given to real processes: one message, exit code 2, no stack trace, and nothing left behind.

Starting a process costs seconds, so each run has as many mistakes as can be seen together.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ranks import free_port

REPO = Path(__file__).resolve().parents[2]
RECIPE = REPO / "recipes" / "lm_16l.py"
TINY = """
max_steps: 2
model: {num_layers: 1, d_model: 32, num_heads: 2, num_kv_heads: 1}
moe: {num_experts: 2, intermediate_size: 16}
data: {seq_len: 32, num_workers: 0}
optim: {warmup_steps: 1}
eval: {max_tokens: 64, sample_tokens: 0}
telemetry: {tensorboard: false, wandb: off}
"""


@dataclass(frozen=True)
class Refused:
    """What the ranks of a job left behind: their exit codes, and what they printed together."""

    exit_codes: list[int]
    output: str

    @property
    def problems(self) -> list[str]:
        return [line.removeprefix("  - ") for line in self.output.splitlines() if line.startswith("  - ")]


def run(*argv: str, folder: Path, ranks: int = 1) -> Refused:
    """Run the recipe in ``folder`` as one process, or as ranks that a launcher would start."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PMI", "MASTER_"))}
    environ = {name: value for name, value in environ.items() if "RANK" not in name and "WORLD_SIZE" not in name}
    environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPO)}
    port, processes = str(free_port()), []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, str(RECIPE), *argv], cwd=folder, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, env=environ | (place if ranks > 1 else {}),
            )
        )  # fmt: skip
    try:
        output = "".join(process.communicate(timeout=120)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()
    return Refused([process.returncode for process in processes], output)


def assert_refused(refused: Refused, *expected: str) -> None:
    """One message with exactly the ``expected`` problems, each given by how it starts."""
    assert set(refused.exit_codes) == {2}, refused.output
    assert "Traceback" not in refused.output, refused.output
    assert refused.output.count("error: ") == 1, refused.output
    noun = "problem" if len(expected) == 1 else "problems"
    assert f"error: {len(expected)} {noun} with the settings\n" in refused.output
    for start in expected:
        assert sum(problem.startswith(start) for problem in refused.problems) == 1, f"{start}\n{refused.output}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with spaces in its name and every kind of input that is no good."""
    made = tmp_path / "work here"
    for name in ("empty", "blank", "docs", "runs/old"):
        (made / name).mkdir(parents=True)
    (made / "blank" / "a.txt").write_text(" \n\t\n")
    (made / "runs" / "old" / "run.json").write_text("{}")
    for number in range(20):
        (made / "docs" / f"{number}.txt").write_text(f"Document number {number}. " * 20)
    (made / "a file").write_text("text")
    (made / "broken").symlink_to(made / "nowhere")
    (made / "tiny.yaml").write_text(TINY)
    (made / "settings.yaml").write_text("moe: {topk: 2, num_experts: 16}\nmodel: 3\n")
    (made / "ds.json").write_text(json.dumps({"optimizer": {}, "bf16": {"enabled": "yes"}, "train_batch_size": 3}))
    return made


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_many_wrong_settings_on_two_ranks(folder: Path) -> None:
    before = listing(folder)
    refused = run(
        "--config",
        "settings.yaml",
        "--moe.top_k",
        "99",
        "--model.num_heads",
        "7",
        "--foo",
        "1",
        "--seed",
        "x",
        "--deepspeed_config",
        "ds.json",
        "--deepspeed_override",
        "zero_optimization.stage=3.0",
        "--data.source",
        "empty",
        "--output_dir",
        "runs/new",
        "--resume",
        "must",
        "--max_steps",
        folder=folder,
        ranks=2,
    )
    assert_refused(
        refused,
        "moe.topk: no such setting in the YAML file; did you mean moe.top_k?",
        "model: '3', but it is a section",
        "moe.top_k: 99 > moe.num_experts = 16; choose 1 to 16",
        "model.num_heads: 7 does not divide",
        "--foo: no such setting on the command line",
        "seed: 'x'; should be a valid integer",
        "--max_steps: given without",
        "deepspeed_config: optimizer: this section contradicts",
        "deepspeed_config: bf16.enabled: 'yes'; choose true or false",
        "deepspeed_config: train_batch_size: 3 != ",
        "deepspeed_config: zero_optimization.stage: 3.0; choose 0, 1, 2 or 3",
        "data.source: the folder empty has no file",
        "resume: runs/new holds no checkpoint",
        "model.num_kv_heads: ",
    )
    assert listing(folder) == before


def test_missing_files_and_a_run_in_the_way(folder: Path) -> None:
    before = listing(folder)
    refused = run(
        "--config",
        "missing.yaml",
        "--deepspeed_config",
        "missing.json",
        "--data.source",
        "broken",
        "--data.tokenizer",
        "./nowhere",
        "--output_dir",
        "runs/old",
        folder=folder,
    )
    assert_refused(
        refused,
        "config: cannot read missing.yaml: No such file",
        "deepspeed_config: cannot read missing.json: No such file",
        "data.source: 'broken' does not exist",
        "data.tokenizer: the folder './nowhere' does not exist",
        "output_dir: runs/old already holds a run; continue it with --resume auto",
    )
    assert listing(folder) == before


@pytest.mark.parametrize("ranks", [1, 2])
def test_text_that_turns_out_to_be_blank(folder: Path, ranks: int) -> None:
    """Found only when the text is read, with the process group up: all ranks must stop, and rank 0 speaks."""
    refused = run(
        "--config",
        "tiny.yaml",
        "--data.source",
        "blank",
        "--data.cache_dir",
        "cache",
        "--output_dir",
        "runs/new",
        folder=folder,
        ranks=ranks,
    )
    assert_refused(refused, "data.source: blank has no readable document: a.txt: empty text")
    assert not (folder / "runs" / "new").exists()
    assert not list(folder.glob("cache/text/*/*")), "no half-made text"


def test_output_dir_that_cannot_be_made(folder: Path) -> None:
    before = listing(folder)
    paths = ("--data.source", "docs", "--data.cache_dir", "cache", "--output_dir", "a file/below")
    assert_refused(run("--config", "tiny.yaml", *paths, folder=folder), "output_dir: a file/below ")
    assert listing(folder) == before
