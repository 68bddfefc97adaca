"""The README's commands: those that a CPU can run are run, the others are checked against the machine they name."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from moe_scale import cli
from moe_scale.parallel import device as devices
from moe_scale.parallel import launch as launches
from moe_scale.train.recipe import Recipe, prepare_job
from recipes import classifier, lm_16l, multimodal, switch, translation
from tests.curves import TINY_SWITCH, write_words
from tests.hf import model_folder
from tests.ranks import REPO, free_port, run_ranks
from tests.recipes.test_multimodal import TINY as TINY_MULTIMODAL
from tests.unit.checkpoint.builders import small_config, write_checkpoint
from tests.unit.tools.report_runs import write_run

BLOCKS = re.findall(r"```bash\n(.*?)```", (REPO / "README.md").read_text(), flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
GPU_RANKS = {"--num_gpus 8": (8, 8), "hostfiles/2x8": (16, 8), "srun": (16, 8), "sbatch": (16, 8), "zero3_1gpu": (1, 1)}
"""What marks a command as one for GPUs, and the ranks (in all, a node) that it starts."""


def gpu_ranks(command: str) -> tuple[int, int] | None:
    return next((ranks for mark, ranks in GPU_RANKS.items() if mark in command), None)


RECIPES = {
    "recipes/translation.py": translation.RECIPE,
    "recipes/classifier.py": classifier.RECIPE,
    "recipes/switch.py": switch.RECIPE,
    "recipes/multimodal.py": multimodal.RECIPE,
}


def recipe_of(command: str) -> Recipe:
    return next((recipe for name, recipe in RECIPES.items() if name in command), lm_16l.RECIPE)


LAUNCHES = [c for c in COMMANDS if c.startswith("moe-scale launch ")]
FOR_GPUS = [c for c in COMMANDS if gpu_ranks(c) and c not in LAUNCHES]
SERVERS = [c for c in COMMANDS if c.startswith("moe-scale serve ")]
FOR_CPU = [c for c in COMMANDS if not gpu_ranks(c) and c not in LAUNCHES + SERVERS]


def test_the_readme_has_commands_of_both_kinds() -> None:
    assert len(FOR_GPUS) >= 4
    assert len(FOR_CPU) >= 6
    assert "make train" in FOR_CPU
    assert "make test" in FOR_CPU


@pytest.mark.parametrize("command", FOR_GPUS)
def test_command_for_gpus_passes_every_check(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world_size, per_node = gpu_ranks(command) or (1, 1)
    monkeypatch.setattr(launches, "detect", lambda: launches.Launch(0, world_size, 0, per_node, "env"))
    monkeypatch.setattr(devices, "detect", lambda: devices.Device("cuda", "NVIDIA H100", bf16=True, fp16=True))
    words = shlex.split(command)
    recipe = max(n for n, word in enumerate(words) if word.startswith("recipes/"))  # after the batch script
    for word in words:
        if word.startswith(("hostfiles/", "ds_configs/", "recipes/")):
            assert (REPO / word).is_file(), word
    job = prepare_job(recipe_of(command), [*words[recipe + 1 :], "--output_dir", str(tmp_path / "run")])
    assert job.config.scale == ("1gpu" if world_size == 1 else "1node" if world_size == per_node else "multinode")
    assert job.plan.json["train_batch_size"] % world_size == 0


@pytest.mark.parametrize("command", LAUNCHES)
def test_command_that_launches_prints_another(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(REPO)
    for name in [name for name in os.environ if name.startswith("SLURM_") or name == "DS_ACCELERATOR"]:
        monkeypatch.delenv(name)
    cli.main([*shlex.split(command)[1:], "--output_dir", str(tmp_path / "run")])
    checked, *lines = capsys.readouterr().out.splitlines()
    assert checked.startswith("# lm_16l at scale " + ("cpu" if "--device cpu" in command else "multinode"))
    assert any("recipes/lm_16l.py" in line for line in lines)


TRANSLATION = """
max_steps: 2
model: {num_encoder_layers: 1, num_decoder_layers: 1, d_model: 32, num_heads: 4, vocab_size: 700}
moe: {num_experts: 4, intermediate_size: 16}
data: {tokenizer: bpe}
optim: {warmup_steps: 1}
eval: {every: 0, bleu_sentences: 2, test_sentences: 2}
telemetry: {every: 1, wandb: "off"}
"""


@pytest.fixture(scope="module")
def translation_flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that make any command of ``translation`` a matter of seconds."""
    settings = tmp_path_factory.mktemp("translation") / "tiny.yaml"
    settings.write_text(TRANSLATION)
    return ["--config", str(settings)]


@pytest.fixture(scope="module")
def classifier_flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that make any command of ``classifier`` a matter of seconds."""
    settings = tmp_path_factory.mktemp("classifier") / "tiny.yaml"
    settings.write_text(
        "max_steps: 2\nmodel: {input_size: 16, hidden_size: 32, num_experts: 4, vocab_size: 700}\n"
        "data: {tokenizer: bpe}\noptim: {warmup_steps: 1}\n"
        'eval: {max_examples: 20}\ntelemetry: {every: 1, wandb: "off"}\n'
    )
    return ["--config", str(settings)]


@pytest.fixture(scope="module")
def switch_flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that make any command of ``switch`` a matter of seconds."""
    folder = tmp_path_factory.mktemp("switch")
    write_words(folder / "text.jsonl", 40)
    (folder / "tiny.yaml").write_text(TINY_SWITCH.replace("warmup_steps: 2", "warmup_steps: 1"))
    return ["--config", str(folder / "tiny.yaml"), "--data.source", str(folder / "text.jsonl")]


@pytest.fixture(scope="module")
def multimodal_flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that make any command of ``multimodal`` on the sample a matter of seconds."""
    path = tmp_path_factory.mktemp("multimodal") / "tiny.yaml"
    path.write_text(TINY_MULTIMODAL)
    return [
        "--config",
        str(path),
        "--data.image_size",
        "16",
        "--eval.max_items",
        "16",
        "--optim.warmup_steps",
        "1",
        "--model.vocab_size",
        "400",
    ]


@pytest.fixture(scope="module")
def multimodal_run(multimodal_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of ``multimodal``."""
    run = tmp_path_factory.mktemp("trained") / "run"
    flags = shlex.join([*multimodal_flags, "--max_steps", "2", "--output_dir", str(run)])
    done = shell(f"python recipes/multimodal.py {flags}")
    assert done.returncode == 0, done.stderr[-3000:]
    return run


@pytest.fixture(scope="module")
def translation_run(translation_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of ``translation``, for the tools."""
    run = tmp_path_factory.mktemp("run") / "translation"
    flags = [*translation_flags, "--data.pairs", "en-de", "en-fr", "--output_dir", str(run)]
    run_ranks(1, [str(REPO / "recipes" / "translation.py"), *flags])
    return run


@pytest.fixture(scope="module")
def language_model_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stored run of ``lm_16l`` with the tokenizer's vocabulary, for the tools."""
    folder = tmp_path_factory.mktemp("lm")
    config = small_config(folder)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=50304),
        eval=dataclasses.replace(config.eval, max_tokens=1024),
    )
    write_checkpoint(folder / "lm_16l", config)
    return folder / "lm_16l"


@pytest.mark.parametrize("command", SERVERS)
def test_command_that_serves_serves(command: str, language_model_run: Path) -> None:
    words = shlex.split(command.replace("runs/lm_16l", str(language_model_run)))
    words[0] = str(Path(sys.executable).with_name(words[0]))
    if "--port" in words:
        words[words.index("--port") + 1] = str(free_port())
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        assert "http://127.0.0.1:" in server.stderr.readline()
        server.terminate()
        assert server.wait(timeout=60) == 0


def on_a_run(command: str, run: Path, tmp_path: Path) -> str:
    """The command of a tool, on ``run`` and with files of its own."""
    (tmp_path / "messages.txt").write_text("Delete the person\n")
    (tmp_path / "prompts.txt").write_text("ROMEO.\nJULIET.\n")
    command = command.replace("runs/translation", str(run)).replace("runs/lm_16l", str(run))
    return re.sub(r"((?:messages|prompts|texts)\.\S*)", rf"{tmp_path}/\1", command)


def on_models(command: str, tmp_path: Path) -> str:
    """The command of a tool that makes one model of another, on small ones."""
    run = model_folder(tmp_path / "run", {}, {})
    if "import" in command:
        cli.main(["export", str(run), "--output_dir", str(tmp_path / "exported" / "lm_16l")])
    dense = model_folder(tmp_path / "dense", {}, {"enabled": False}) if "upcycle" in command else run
    command = command.replace("runs/lm_16l", str(run)).replace("models/dense", str(dense))
    return re.sub(r"(?<= )(exported|models)/", rf"{tmp_path}/\1/", command)


def on_runs(command: str, tmp_path: Path) -> str:
    """The command of a tool that reads runs, on runs that are made up."""
    for name in re.findall(r"(?<!--output_dir )runs/(\S+)", command):
        write_run(tmp_path / "runs" / name)
    return command.replace("runs/", f"{tmp_path}/runs/")


HELD_ELSEWHERE = {
    "deepspeed --num_accelerators 2 recipes/lm_16l.py --moe.ep_size 2": "test_launchers.py",
    "torchrun --nproc_per_node 2 recipes/lm_16l.py --moe.ep_size 2": "test_launchers.py",
    "deepspeed --num_accelerators 2 recipes/compare_moe.py --max_steps 20 --moe.ep_size 2": "test_compare.py",
    "deepspeed --num_accelerators 2 recipes/translation.py --moe.ep_size 2 --moe.backend deepspeed": "distributed",
    "deepspeed --num_accelerators 2 recipes/classifier.py --moe.ep_size 2 --moe.backend deepspeed": "distributed",
    "deepspeed --num_accelerators 2 recipes/switch.py --moe.ep_size 2 --moe.backend deepspeed": "distributed",
    "deepspeed --num_accelerators 2 recipes/multimodal.py --moe.ep_size 2 --moe.num_experts 16": "test_multimodal.py",
    "python recipes/multimodal.py --model.pretrained runs/multimodal --lora.rank 8 --eval.at_start true --output_dir "
    "runs/adapted": "test_multimodal.py",
    "python recipes/lm_16l.py": "make train, which is among these commands",
    "python recipes/translation.py --data.pairs en-de en-fr": "translation_run here",
    "python recipes/classifier.py --data.tokenizer encoder --model.embeddings encoder --model.input_size 384 "
    "--model.vocab_size 30522": "test_classifier.py",
    "python recipes/lm_16l.py --resume auto": "test_lm_16l.py",
    "moe-scale prune runs/lm_16l --compare --output_dir runs/compared": "tools/test_prune.py",
}
"""Commands whose like another test starts, and where; here they are long."""

IN_THIS_PROCESS = tuple(
    f"moe-scale {tool} "
    for tool in (
        *("translate", "generate", "experts", "report", "reshard", "sweep", "plan", "prune"),
        *("export", "import", "upcycle"),
    )
)
"""Tools that start no ranks: a process of their own would take longer to begin than they do to run."""


def shell(command: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    environ = {name: value for name, value in environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(command, shell=True, cwd=REPO, env=environ, capture_output=True, text=True, timeout=200)


def in_this_process(command: str, capsys: pytest.CaptureFixture[str]) -> subprocess.CompletedProcess[str]:
    with contextlib.chdir(REPO):
        cli.main(shlex.split(command)[1:])
    said = capsys.readouterr()
    return subprocess.CompletedProcess(command, 0, said.out, said.err)


def test_commands_held_elsewhere_are_in_the_readme() -> None:
    assert set(FOR_CPU) >= HELD_ELSEWHERE.keys()


@pytest.mark.parametrize(
    "command", [pytest.param(c, marks=[pytest.mark.long] if c in HELD_ELSEWHERE else []) for c in FOR_CPU]
)
def test_command_for_a_cpu_runs(
    command: str,
    tiny_flags: list[str],
    translation_flags: list[str],
    classifier_flags: list[str],
    switch_flags: list[str],
    multimodal_flags: list[str],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags_of = {
        "recipes/translation.py": translation_flags,
        "recipes/classifier.py": classifier_flags,
        "recipes/switch.py": switch_flags,
        "plan recipes/multimodal.py": ["--optim.warmup_steps", "1"],
        "recipes/multimodal.py": multimodal_flags,
    }
    own = next((flags for name, flags in flags_of.items() if name in command), tiny_flags)
    flags = shlex.join([*own, "--max_steps", "2", "--output_dir", str(tmp_path / "run")])
    if "--print_config" in command:
        flags = ""
    if command.startswith("moe-scale bench --calibrate"):
        flags += " --rounds 1 --warmup 0"
    elif command.startswith("moe-scale sweep"):  # tests/recipes/test_sweep.py trains one
        writes = "--wandb_sweep" in command
        command = command.replace(" runs/sweep.yaml", f" {tmp_path / 'sweep.yaml'}")
        flags += "" if writes else " --dry_run"
    elif command.startswith("moe-scale bench-checkpoint"):
        flags += " --rounds 1 --steps 1"
    elif command.startswith(("moe-scale translate", "moe-scale experts")):
        command, flags = on_a_run(command, request.getfixturevalue("translation_run"), tmp_path), ""
    elif "--model.pretrained runs/multimodal" in command:
        command = command.replace("runs/multimodal", str(request.getfixturevalue("multimodal_run")))
    elif command.startswith("moe-scale generate"):
        command, flags = on_a_run(command, request.getfixturevalue("language_model_run"), tmp_path), ""
    elif command.startswith(("moe-scale export", "moe-scale import", "moe-scale upcycle")):
        command, flags = on_models(command, tmp_path), ""
    elif command.startswith("moe-scale report"):
        command, flags = on_runs(command, tmp_path), ""
    elif command.startswith("moe-scale prune"):
        run = request.getfixturevalue("language_model_run")
        command = command.replace("runs/lm_16l", str(run)).replace("runs/", f"{tmp_path}/")
        flags = "--calibration_tokens 1024"
    elif command.startswith("moe-scale reshard"):
        write_checkpoint(tmp_path / "run", small_config(tmp_path))
        command, flags = command.replace("runs/lm_16l lm_16l-weights", f"{tmp_path}/run {tmp_path}/weights"), ""
    elif command.startswith("moe-scale bench"):
        flags = "--tokens 32 --d_model 32 --intermediate_size 16 --num_experts 4 --rounds 1 --warmup 0"
        flags += f" --output_dir {tmp_path}"
    if command.startswith("make"):
        # The installation that these tests run in serves; what is left is what the target does with it.
        venv = Path(sys.prefix)
        (tmp_path / "installed").touch()
        make = f"make -C {REPO} VENV={venv} INSTALLED={tmp_path / 'installed'} -o {tmp_path / 'installed'}"
        if command == "make test":
            command, flags = f"{make} -n test", ""
        else:
            given = re.search(r'ARGS="([^"]*)"', command)
            command, flags = f"{make} train ARGS={shlex.quote(((given[1] + ' ') if given else '') + flags)}", ""
    command = re.sub(r"^(deepspeed|torchrun) ", rf"\1 --master_port {free_port()} ", command)
    started = f"{command} {flags}"
    done = in_this_process(started, capsys) if command.startswith(IN_THIS_PROCESS) else shell(started)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    if "moe-scale compare" in command or "compare_moe" in command:
        assert (tmp_path / "run" / "compare.json").is_file()
    elif command.startswith("moe-scale sweep"):
        assert (tmp_path / "sweep.yaml").is_file() or "of 1 rank, compared by eval/loss" in done.stdout
    elif command.startswith("moe-scale plan"):
        assert (tmp_path / "run" / "plan.json").is_file()
    elif "--calibrate" in command:
        assert (tmp_path / "run" / "calibration.json").is_file()
    elif "bench-checkpoint" in command:
        assert (tmp_path / "run" / "bench_checkpoint.json").is_file()
    elif command.startswith("moe-scale export"):
        assert (tmp_path / "exported" / "lm_16l" / "model.safetensors").is_file()
    elif command.startswith(("moe-scale import", "moe-scale upcycle")):
        assert list(tmp_path.glob("models/*/run.json"))
    elif command.startswith("moe-scale report"):
        assert "--live" in command or Path(done.stdout.strip()).is_file()
    elif command.startswith("moe-scale prune"):
        assert len(list(tmp_path.glob("*/prune.md"))) == 1
    elif "reshard" in command:
        assert (tmp_path / "weights" / "index.json").is_file()
    elif "recipes/" in command and "--print_config" not in command:
        assert (tmp_path / "run" / "metrics.jsonl").is_file()
    if command.startswith("make") and " train " in command:
        assert "held-out loss" in done.stdout
        assert "unigram entropy" in done.stdout
