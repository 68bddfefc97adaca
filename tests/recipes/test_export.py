"""A trained ``lm_16l``: out to transformers, back, and on with training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from moe_scale.cli import main
from moe_scale.data.tokenizer import load_tokenizer
from moe_scale.train.recipe import prepare_job
from recipes.lm_16l import RECIPE
from tests.hf import TOLERANCE, assert_same_model, greedy, ours, theirs
from tests.ranks import REPO, run_ranks
from tests.recipes.conftest import records

TRAIN_CASES = str(REPO / "tests" / "distributed" / "train_cases.py")


def train(folder: Path, *cases: list[str]) -> None:
    (folder / "cases.json").write_text(json.dumps(cases))
    run_ranks(1, [TRAIN_CASES, str(folder / "cases.json")])


def test_a_run_goes_out_comes_back_and_goes_on(tiny_flags: list[str], tmp_path: Path) -> None:
    run, exported, model = (tmp_path / name for name in ("run", "exported", "model"))
    train(tmp_path, [*tiny_flags, "--output_dir", str(run)])
    main(["export", str(run), "--output_dir", str(exported)])
    their, our = theirs(exported), ours(run)
    assert type(their).__name__ == "Qwen3NextForCausalLM"
    assert_same_model(our, their, new_tokens=64)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    prompt = tokenizer("ROMEO.\nWhat light", return_tensors="pt")
    assert prompt["input_ids"][0, 1:].tolist() == load_tokenizer("gpt2").encode("ROMEO.\nWhat light")
    text = their.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert torch.equal(text, greedy(our, prompt["input_ids"], 12)[0])

    assert load_tokenizer(str(exported)).fingerprint == load_tokenizer("gpt2").fingerprint

    main(["import", str(exported), "--output_dir", str(model)])
    ids_BS = torch.arange(30).view(2, 15) * 1000
    torch.testing.assert_close(ours(model)(ids_BS), our(ids_BS), rtol=TOLERANCE, atol=TOLERANCE)
    on = {name: str(tmp_path / f"on-{name}") for name in ("run", "model", "bf16")}
    from_model = ["--model.pretrained", str(model), "--data.tokenizer", str(model / "tokenizer")]
    assert prepare_job(RECIPE, [*tiny_flags, *from_model, "--output_dir", on["model"]]).remarks == ()
    train(
        tmp_path,
        [*tiny_flags, "--model.pretrained", str(run), "--output_dir", on["run"]],
        [*tiny_flags, *from_model, "--output_dir", on["model"]],
        [*tiny_flags, *from_model, "--output_dir", on["bf16"], "--deepspeed_override", "bf16.enabled=true"],
    )
    kept, back, rounded = ([r["loss"] for r in records(Path(on[name])) if "loss" in r] for name in on)
    assert back == pytest.approx(kept, abs=1e-5)
    assert rounded == pytest.approx(kept, abs=0.05)
    drawn = [r["loss"] for r in records(run) if "loss" in r]
    assert kept[0] < drawn[0] - 0.05, "the first loss is that of trained weights"
