"""The recipe ``switch``: its scales, what it refuses, what a run leaves, and that what it says of drops is so."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import moe_scale
from moe_scale import cli
from moe_scale.config import SCALES, SwitchConfig
from moe_scale.data.sentinels import encode_with_sentinels, with_sentinels
from moe_scale.data.span_corruption import restore
from moe_scale.data.tokenizer import load_tokenizer
from moe_scale.errors import ConfigError
from moe_scale.generate.full_passes import sample_ids
from moe_scale.models.switch import SwitchLayer, SwitchLM
from moe_scale.parallel import device as devices
from moe_scale.parallel import launch as launches
from moe_scale.train.recipe import prepare_job
from moe_scale.train.switch import SwitchTask
from recipes.switch import RECIPE
from tests.curves import TINY_SWITCH, write_words
from tests.ranks import REPO, run_ranks
from tests.recipes.conftest import records
from tests.recipes.test_lm_16l import RANKS_OF_SCALE

TRAIN_CASES = str(REPO / "tests" / "distributed" / "train_cases.py")
SPANS = ["--model.objective", "span_corruption"]


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_passes_the_checks(scale: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world_size, per_node = RANKS_OF_SCALE[scale]
    kind = "cpu" if scale == "cpu" else "cuda"
    monkeypatch.setattr(launches, "detect", lambda: launches.Launch(0, world_size, 0, per_node, "env"))
    monkeypatch.setattr(devices, "detect", lambda: devices.Device(kind, "a device", bf16=True, fp16=True))
    for flags in ([], SPANS):
        job = prepare_job(RECIPE, ["--output_dir", str(tmp_path / "run"), *flags])
        assert job.config.scale == scale
        assert job.plan.stage == 3


def test_the_defaults_are_those_of_switch_transformers(tmp_path: Path) -> None:
    config = prepare_job(RECIPE, ["--output_dir", str(tmp_path / "run")]).config
    assert isinstance(config, SwitchConfig)
    moe = config.moe
    assert (moe.top_k, moe.capacity_factor, moe.eval_capacity_factor, moe.aux_loss_weight) == (1, 1.25, 2.0, 0.01)
    assert (moe.every, moe.dispatch, config.model.init_scale) == (2, "capacity", 0.1)


@pytest.mark.parametrize(
    ("flags", "where", "what"),
    [
        (["--moe.activation", "swiglu"], "moe.activation", "choose relu or gelu"),
        (["--moe.every", "5"], "moe.every", "no layer is sparse"),
        (["--moe.top_k", "9"], "moe.top_k", "choose 1 to 8"),
        (["--model.num_heads", "5"], "model.num_heads", "does not divide model.d_model = 128; choose one of [1, 2, 4"),
        (["--model.positions", "learned", "--model.max_positions", "100"], "model.max_positions", "at least 128"),
        (["--model.positions", "learned", "--model.max_positions", "130", *SPANS], "model.max_positions", "at least"),
        (["--model.num_sentinels", "5", *SPANS], "model.num_sentinels", "choose at least 7"),
        (["--model.vocab_size", "300", *SPANS], "model.vocab_size", "257 tokens of data.tokenizer = bytes and 100"),
        (["--model.vocab_size", "256"], "model.vocab_size", "choose at least 257"),
        (["--data.seq_len", "1", *SPANS], "data.seq_len", "choose at least 2"),
        (["--eval.max_tokens", "127", *SPANS], "eval.max_tokens", "no whole text would be scored"),
        (["--eval.prompt", "a <extra_id_100>", *SPANS], "eval.prompt", "there are <extra_id_0> to <extra_id_99>"),
        (["--eval.prompt", "a <extra_id_0>" * 60, *SPANS], "eval.prompt", "leave no room in a sequence of"),
        (["--model.noise_density", "1"], "model.noise_density", "less than 1"),
        (["--model.objective", "prefix"], "model.objective", "causal"),
        (["--data.tokenizer", "byte"], "data.tokenizer", "choose bytes, gpt2"),
        (["--moe.backend", "deepspeed", "--moe.expert_dropout", "0.4"], "moe.expert_dropout", "moe.backend custom"),
    ],
)
def test_what_is_refused(flags: list[str], where: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        prepare_job(RECIPE, [*flags, "--output_dir", str(tmp_path / "run")])
    assert any(p.where == where and what in str(p) for p in refused.value.problems), refused.value


PROMPT = "it <extra_id_0> and <extra_id_1>"
CASES = {
    "whole": ["--eval.every", "3", "--eval.sample_tokens", "12", "--telemetry.tensorboard", "true"],
    "spans": [*SPANS, "--eval.sample_tokens", "12", "--eval.prompt", PROMPT, "--eval.every", "3"],
    "dense": ["--moe.enabled", "false", "--eval.every", "3"],
    "every": ["--moe.every", "1", "--moe.router_jitter", "0.01", "--moe.expert_dropout", "0.4", "--model.bias", "true",
              "--moe.expert_bias", "true", "--moe.z_loss_weight", "0.001", "--model.positions", "learned"],
    "choice": ["--moe.router", "expert_choice", "--model.norm_order", "post",
               "--model.activation_checkpointing", "true"],
    "gpt2": ["--data.tokenizer", "gpt2", "--model.vocab_size", "50400", "--max_steps", "3", *SPANS],
    # So little text, so often, that it is learned by heart.
    "overfit": ["--max_steps", "120", "--optim.lr", "0.02", "--eval.every", "10", "--data.holdout_fraction", "0.9",
                "--telemetry.every", "5", "--faults.overfit_evaluations", "2", "--checkpoint.every", "8",
                "--checkpoint.keep_last", "0"],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of all that one process can train in a short time."""
    made = tmp_path_factory.mktemp("switch")
    write_words(made / "text.jsonl", 40)
    (made / "tiny.yaml").write_text(TINY_SWITCH.replace("max_steps: 20", "max_steps: 6"))
    (made / "ds.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 3}}))
    (made / "cases.json").write_text(json.dumps([flags_of(made, name) for name in CASES]))
    printed = run_ranks(1, [TRAIN_CASES, str(made / "cases.json"), "switch"])
    assert "Warning" not in printed, "a user should read no noise"
    (made / "printed.txt").write_text(printed)
    return made


def flags_of(made: Path, name: str) -> list[str]:
    return [
        "--config", str(made / "tiny.yaml"), "--deepspeed_config", str(made / "ds.json"), "--data.source",
        str(made / "text.jsonl"), "--data.cache_dir", str(made / "cache"), "--output_dir", str(made / name),
        *CASES[name],
    ]  # fmt: skip


def test_what_a_run_leaves(folder: Path) -> None:
    for name in CASES:
        logged = [record for record in records(folder / name) if "loss" in record]
        assert all(math.isfinite(record["loss"]) for record in logged), name
    first = records(folder / "whole")[0]
    parts = {"embedding", "attention", "router", "experts", "ffn", "norms"}
    assert {key.removeprefix("grad_norm/") for key in first if key.startswith("grad_norm/")} == parts
    assert len(first["router/logit_rms"]) == 1
    scores = [record for record in records(folder / "whole") if "eval/loss" in record]
    assert [record["step"] for record in scores] == [3, 6]
    assert "eval/bits_per_byte" in scores[0]
    assert "eval/bits_per_byte" not in records(folder / "spans")[-1]
    assert "router/dropped" not in records(folder / "dense")[0]
    assert len(records(folder / "every")[0]["router/entropy"]) == 2
    assert records(folder / "spans")[0]["tokens"] == 4 * 36  # 32 tokens, 5 of them in 2 spans
    printed = (folder / "printed.txt").read_text()
    assert "moe.router expert_choice looks at later tokens" in printed


def test_weight_norms_are_those_of_the_weights_saved(folder: Path) -> None:
    for name in ("whole", "every", "dense"):
        model = moe_scale.load_model(folder / name)
        last = [record for record in records(folder / name) if "eval/loss" in record][-1]
        sparse = [layer.moe for layer in cast(Any, model).layers if layer.moe is not None]
        experts = [norm_of(moe.experts.parameters()) for moe in sparse]
        routers = [norm_of(moe.router.parameters()) for moe in sparse]
        assert last.get("weight_norm/experts", []) == pytest.approx(experts, rel=1e-5)
        assert last.get("weight_norm/router", []) == pytest.approx(routers, rel=1e-5)
        attention = norm_of(p for n, p in model.named_parameters() if "self_attn" in n)
        assert last["weight_norm/attention"] == pytest.approx(attention, rel=1e-5)


def test_autoep_is_refused_without_a_hint_at_what_is_refused_as_well(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        prepare_job(RECIPE, ["--moe.backend", "autoep", "--output_dir", str(tmp_path / "run")])
    (problem,) = refused.value.problems
    assert str(problem) == (
        "moe.backend: autoep takes SwiGLU experts alone, and those of this recipe are relu; use moe.backend custom or "
        "deepspeed"
    )
    flags = ["--moe.backend", "deepspeed", "--moe.top_k", "2", "--moe.renormalize", "false"]
    with pytest.raises(ConfigError, match="renormalize") as refused:
        prepare_job(RECIPE, [*flags, "--output_dir", str(tmp_path / "run")])
    assert "autoep" not in str(refused.value)


def norm_of(parameters: Any) -> float:
    return math.sqrt(sum(float(p.detach().double().square().sum()) for p in parameters))


def test_the_dropped_share_equals_a_recount(folder: Path) -> None:
    """At capacity 1.0: of the first step, whose weights and texts are known."""
    job = prepare_job(RECIPE, [*flags_of(folder, "whole"), "--output_dir", str(folder / "none")])
    task = SwitchTask(cast(SwitchConfig, job.config))
    task.open(micro_batch=job.plan.micro_batch, rank=0, world_size=1)
    model = SwitchLM(job.config.model, job.config.moe, seed=job.config.seed)
    seen: list[Tensor] = []
    moe: Any = cast(SwitchLayer, model.layers[1]).moe
    moe.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    tokens = dropped = 0
    for _ in range(job.plan.grad_accum):
        task.forward(model, next(task.batches()))
        x_TD = seen.pop().flatten(0, 1)
        chosen_T = (x_TD @ moe.router.weight.T).argmax(dim=1)
        places = math.ceil(len(x_TD) / 4 * 1.0)
        tokens += len(x_TD)
        dropped += sum(max(int((chosen_T == expert).sum()) - places, 0) for expert in range(4))
    assert dropped > 0
    assert records(folder / "whole")[0]["router/dropped"] == [pytest.approx(dropped / tokens)]


def test_the_run_tells_of_overfitting(folder: Path) -> None:
    (told,) = re.findall(
        r"was ([0-9.]+) at step ([0-9]+) and is ([0-9.]+), .* overfits", (folder / "printed.txt").read_text()
    )
    best, step, now = float(told[0]), int(told[1]), float(told[2])
    scores = {record["step"]: record["eval/loss"] for record in records(folder / "overfit") if "eval/loss" in record}
    assert scores[step] == pytest.approx(best, abs=1e-4)
    assert scores[step + 20] == pytest.approx(now, abs=1e-4)
    assert best < min(scores[step + 10], now)


def test_a_resumed_run_tells_of_overfitting_where_the_whole_one_does(folder: Path) -> None:
    told = re.compile(r"warning: the held-out loss was .* overfits.*")
    (expected,) = told.findall((folder / "printed.txt").read_text())
    step = int(re.findall(r"at step ([0-9]+)", expected)[0])
    saved = f"step_{(step + 19) // 8 * 8:08d}"  # after the evaluation before the warning, and before the next one
    shutil.copytree(folder / "overfit" / "checkpoints" / saved, folder / "overfit again" / "checkpoints" / saved)
    again = [*flags_of(folder, "overfit"), "--output_dir", str(folder / "overfit again"), "--resume", "must"]
    (folder / "again.json").write_text(json.dumps([again]))
    assert told.findall(run_ranks(1, [TRAIN_CASES, str(folder / "again.json"), "switch"])) == [expected]


def test_the_sample_fills_the_spans_in(folder: Path) -> None:
    """Between the words of the prompt stands what the model wrote, drawn again here from forward passes."""
    model = cast(Any, moe_scale.load_model(folder / "spans"))
    tokenizer = with_sentinels(load_tokenizer("bytes"), 100)
    prompt = encode_with_sentinels(tokenizer, PROMPT, 257)
    written = sample_ids(
        lambda ids_BS: model(ids_BS, prefix=len(prompt)), tokenizer, prompt, num_tokens=12, window=36, seed=1234,
        device=torch.device("cpu"),
    )  # fmt: skip
    end = written.index(259) if 259 in written else len(written)
    expected = tokenizer.decode(restore(prompt, written[:end], 257))
    assert f"sample           {expected}".splitlines()[0] in (folder / "printed.txt").read_text()


def test_texts_too_short_to_be_scored_are_refused(folder: Path) -> None:
    flags = [*flags_of(folder, "spans"), "--data.seq_len", "2000", "--eval.max_tokens", "2000", "--model.num_sentinels",
             "103", "--model.vocab_size", "400", "--output_dir", str(folder / "none")]  # fmt: skip
    task = SwitchTask(cast(SwitchConfig, prepare_job(RECIPE, flags).config))
    with pytest.raises(ConfigError, match=r"data.holdout_fraction: the held-out text has \d+ tokens"):
        task.open(micro_batch=1, rank=0, world_size=1)


def generated(folder: Path, name: str, prompt: str, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    cli.main(["generate", "--run", str(folder / name), "--prompt", prompt, "--device", "cpu", *flags])
    return capsys.readouterr().out


def test_moe_scale_generate_continues_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Greedily, as a forward pass over all that there is says, token by token."""
    found = generated(folder, "whole", "it", capsys, "--temperature", "0", "--max_tokens", "8")
    model, tokenizer = cast(Any, moe_scale.load_model(folder / "whole", dropless=True)), load_tokenizer("bytes")
    ids = [tokenizer.eot_id, *tokenizer.encode("it")]
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids]))[0, -1, : tokenizer.vocab_size].argmax()))
    assert found == tokenizer.decode(ids[3:]) + "\n"


def test_moe_scale_generate_fills_in(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = generated(folder, "spans", PROMPT, capsys, "--temperature", "0", "--max_tokens", "8")
    model = cast(Any, moe_scale.load_model(folder / "spans", dropless=True))
    tokenizer = with_sentinels(load_tokenizer("bytes"), 100)
    prompt = encode_with_sentinels(tokenizer, PROMPT, 257)
    ids = list(prompt)
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids]), prefix=len(prompt))[0, -1, : tokenizer.vocab_size].argmax()))
    assert found == tokenizer.decode(ids[len(prompt) :]).split("<extra_id_2>")[0] + "\n"
    for wrong, what in (
        ("", "is empty; this model fills in blanks marked <extra_id_0>, <extra_id_1> ..., as in: The <extra_id_0>"),
        ("a <extra_id>", "prompt 1: has no <extra_id_0>; this model fills in blanks marked <extra_id_0>"),
        ("a <extra_id_100>", "there are <extra_id_0> to <extra_id_99>"),
    ):
        with pytest.raises(SystemExit) as left:
            generated(folder, "spans", wrong, capsys)
        assert left.value.code == 2
        assert what in capsys.readouterr().err


def test_moe_scale_generate_refuses_experts_that_choose(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        generated(folder, "choice", "it", capsys)
    assert left.value.code == 2
    assert "expert_choice" in capsys.readouterr().err
