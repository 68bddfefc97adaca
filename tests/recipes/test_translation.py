"""The recipe ``translation``: its scales, what it refuses, what a run leaves, and the tools that use a run."""

from __future__ import annotations

import io
import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import moe_scale
from moe_scale.cli import main
from moe_scale.config import SCALES, MoEConfig, Seq2SeqConfig, TranslationConfig
from moe_scale.data.pairs.batches import PairItem, make_batch
from moe_scale.errors import ConfigError
from moe_scale.evaluate.text_metrics import text_scores
from moe_scale.parallel import device as devices
from moe_scale.parallel import launch as launches
from moe_scale.train.recipe import prepare_job
from recipes.translation import RECIPE
from tests.curves import TINY_TRANSLATION, write_pairs
from tests.ranks import REPO, run_ranks
from tests.recipes.conftest import records
from tests.recipes.test_lm_16l import RANKS_OF_SCALE

TRAIN_CASES = str(REPO / "tests" / "distributed" / "train_cases.py")


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_passes_the_checks(scale: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world_size, per_node = RANKS_OF_SCALE[scale]
    kind = "cpu" if scale == "cpu" else "cuda"
    monkeypatch.setattr(launches, "detect", lambda: launches.Launch(0, world_size, 0, per_node, "env"))
    monkeypatch.setattr(devices, "detect", lambda: devices.Device(kind, "a device", bf16=True, fp16=True))
    job = prepare_job(RECIPE, ["--output_dir", str(tmp_path / "run")])
    assert job.config.scale == scale
    assert job.plan.stage == 3


@pytest.mark.parametrize(
    ("flags", "where", "what"),
    [
        (["--data.pairs", "en-xx"], "data.pairs", "xx"),
        (["--data.pairs", "en_de"], "data.pairs", "write two different language codes"),
        (["--data.pairs", "en-de", "en-de"], "data.pairs", "named twice"),
        (["--data.source", "nowhere"], "data.source", "nowhere"),
        (["--data.source", "opus_books"], "data.pairs", ""),
        (["--data.source", "opus_books", "--data.pairs", "sv-ca"], "data.pairs", "sv-ca"),
        (["--data.test_fraction", "0"], "data.test_fraction", "0 leaves"),
        (["--data.test_fraction", "0.99"], "data.test_fraction", "leaves nothing to train on"),
        (["--moe.router", "expert_choice", "--moe.dispatch", "capacity"], "moe.router", "later words"),
        (["--model.experts_in", "encoder", "--moe.every", "4"], "moe.every", "no layer is sparse"),
        (["--model.positions", "learned", "--model.max_positions", "50"], "model.max_positions", "choose at least"),
        (["--model.num_heads", "7"], "model.num_heads", "does not divide"),
        (["--checkpoint.save_best", "eval/bits_per_byte"], "checkpoint.save_best", "eval/bleu"),
    ],
)
def test_what_is_refused(flags: list[str], where: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        prepare_job(RECIPE, [*flags, "--output_dir", str(tmp_path / "run")])
    assert any(p.where == where and what in str(p) for p in refused.value.problems), refused.value


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        (["--moe.dispatch", "capacity"], True),
        (["--moe.top_k", "1"], True),
        ([], False),
        (["--moe.top_k", "1", "--moe.ep_size", "1"], False),
        (["--moe.top_k", "1", "--moe.backend", "custom"], False),
    ],
)
def test_buffers_of_unequal_size_are_not_exchanged(flags: list[str], refused: bool, tmp_path: Path) -> None:
    two = launches.Launch(0, 2, 0, 2, "env")
    argv = ["--output_dir", str(tmp_path / "run"), "--moe.backend", "deepspeed", "--moe.ep_size", "2", *flags]
    if not refused:
        assert prepare_job(RECIPE, argv, two)
        return
    with pytest.raises(ConfigError, match="its ranks need batches of one size"):
        prepare_job(RECIPE, argv, two)


def test_experts_may_choose_in_the_encoder(tmp_path: Path) -> None:
    flags = ["--moe.router", "expert_choice", "--moe.dispatch", "capacity", "--model.experts_in", "encoder"]
    job = prepare_job(RECIPE, [*flags, "--output_dir", str(tmp_path / "run")])
    assert job.task.sparse_layers == [0, 1], "the two layers of the encoder"


def test_layers_with_experts_are_numbered_through() -> None:
    def layers(every: int, where: Any) -> list[int]:
        model = Seq2SeqConfig(num_encoder_layers=3, num_decoder_layers=4, experts_in=where)
        return TranslationConfig(model=model, moe=MoEConfig(every=every)).sparse_layers

    assert layers(1, "both") == [0, 1, 2, 3, 4, 5, 6]
    assert layers(2, "both") == [1, 4, 6]
    assert layers(2, "decoder") == [4, 6]
    assert layers(3, "encoder") == [2]


def test_learned_positions_reach_the_end_of_the_longest_translation() -> None:
    config = TranslationConfig(moe=MoEConfig(enabled=False))
    longest_source = make_batch([PairItem([5] * config.data.max_len, None, 4)]).source_BS
    assert config.max_target_len(longest_source.shape[1]) == config.longest_sequence
    learned = replace(config.model, positions="learned", max_positions=config.longest_sequence)
    assert replace(config, model=learned).problems() == []
    short = replace(learned, max_positions=config.longest_sequence - 1)
    assert [p.where for p in replace(config, model=short).problems()] == ["model.max_positions"]


@pytest.mark.parametrize("where", ["encoder", "decoder"])
def test_experts_with_few_places_are_remarked_on(where: Any) -> None:
    model = Seq2SeqConfig(experts_in=where)
    (remark,) = TranslationConfig(model=model, moe=MoEConfig(dispatch="capacity")).remarks()
    assert "depend on the other sentences" in remark
    assert TranslationConfig(model=model).remarks() == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of all that one process can train in a short time."""
    made = tmp_path_factory.mktemp("translation")
    write_pairs(made / "pairs.tsv")
    (made / "tiny.yaml").write_text(TINY_TRANSLATION.replace("max_steps: 20", "max_steps: 6"))
    (made / "ds.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}))
    cases = {
        "whole": ["--eval.every", "3", "--checkpoint.every", "3", "--model.dropout", "0.2"],
        "capacity": ["--moe.dispatch", "capacity", "--moe.capacity_factor", "0.5", "--moe.min_capacity", "1"],
        "choice": ["--moe.router", "expert_choice", "--moe.dispatch", "capacity", "--model.experts_in", "encoder"],
        "hash": ["--moe.router", "hash", "--model.positions", "learned", "--model.norm", "layernorm"],
        "post": ["--model.norm_order", "post", "--model.positions", "sinusoidal", "--moe.residual", "true"],
        "dense": ["--moe.enabled", "false", "--moe.dense_size", "total", "--eval.bleu_sentences", "0"],
        "bpe": ["--data.tokenizer", "bpe", "--data.pairs", "de-en", "--model.activation_checkpointing", "true"],
        "bf16": ["--deepspeed_override", "bf16.enabled=true", "--moe.router", "sigmoid"],
    }  # fmt: skip
    (made / "cases.json").write_text(json.dumps([flags_of(made, name, flags) for name, flags in cases.items()]))
    printed = run_ranks(1, [TRAIN_CASES, str(made / "cases.json"), "translation"])
    assert "Warning" not in printed, "a user should read no noise"
    (made / "printed.txt").write_text(printed)
    return made


def flags_of(made: Path, name: str, flags: list[str]) -> list[str]:
    return [
        "--config", str(made / "tiny.yaml"), "--deepspeed_config", str(made / "ds.json"), "--data.source",
        str(made / "pairs.tsv"), "--data.cache_dir", str(made / "cache"), "--output_dir", str(made / name), *flags,
    ]  # fmt: skip


def test_what_a_run_leaves(folder: Path) -> None:
    runs = [path for path in folder.iterdir() if (path / "metrics.jsonl").is_file()]
    assert len(runs) == 8
    for run in runs:
        logged = [record for record in records(run) if "loss" in record]
        assert [record["step"] for record in logged] == [1, 2, 3, 4, 5, 6], run.name
        assert all(math.isfinite(record["loss"]) for record in logged)
        assert 0 < logged[-1]["tokens"] <= 6 * 256, "real tokens, at most the budget"
        assert (run / "tokenizer.model").is_file()
    scores = [record for record in records(folder / "whole") if "eval/loss" in record]
    assert [record["step"] for record in scores] == [3, 6]
    assert {"eval/bleu", "eval/chrf", "eval/bleu/en-de", "eval/chrf/de-en"} <= scores[-1].keys()
    assert not any("bleu" in key for record in records(folder / "dense") for key in record)
    assert "router/entropy" not in records(folder / "dense")[0]
    assert "grad_norm/ffn" in records(folder / "dense")[0]
    assert len(records(folder / "choice")[0]["router/entropy"]) == 1
    assert max(records(folder / "capacity")[0]["router/dropped"]) > 0.1


def test_scores_are_those_of_the_translations_kept(folder: Path) -> None:
    stored = json.loads((folder / "whole" / "test_scores.json").read_text())
    kept = [json.loads(line) for line in (folder / "whole" / "test_translations.jsonl").read_text().splitlines()]
    for way, text in (("greedy", "greedy"), ("beam", "beam"), ("copy", "source")):
        for direction in ("en-de", "de-en", "overall"):
            some = [line for line in kept if direction in (line["direction"], "overall")]
            expected = text_scores([line[text] for line in some], [line["target"] for line in some])
            assert stored["scores"][way][direction] == vars(expected)
    assert "tok:13a" in stored["signatures"]["bleu"]
    printed = (folder / "printed.txt").read_text()
    assert stored["signatures"]["bleu"] in printed
    columns = [f"{stored['scores'][way]['overall']['bleu']:7.1f}" for way in ("beam", "greedy", "copy", "nearest")]
    assert f"  overall      {' | '.join(columns)} | {stored['scores']['beam']['overall']['chrf']:.1f}, " in printed
    assert "   beam |  greedy |  copied | nearest | chrF of beam\n" in printed


def test_resuming_gives_the_same_to_the_bit(folder: Path) -> None:
    steps = [record for record in records(folder / "whole") if "loss" in record]
    again = flags_of(folder, "again", ["--checkpoint.every", "3", "--model.dropout", "0.2", "--eval.every", "3"])
    listed = [[*again, "--max_steps", "3"], [*again, "--resume", "must"]]
    # A shorter run has another schedule; here the rate is the same in both.
    constant = ["--optim.schedule", "constant"]
    straight = flags_of(folder, "straight", ["--model.dropout", "0.2", *constant])
    (folder / "again.json").write_text(json.dumps([straight, *([*argv, *constant] for argv in listed)]))
    run_ranks(1, [TRAIN_CASES, str(folder / "again.json"), "translation"])
    figures = [
        [(r["step"], r["loss"], r["grad_norm"], r["tokens"]) for r in records(folder / name) if "loss" in r]
        for name in ("straight", "again")
    ]
    assert figures[0] == figures[1]
    assert len(figures[0]) == len(steps)


def translate(*argv: str, given: bytes = b"") -> str:
    """Standard output of ``moe-scale translate`` in this process."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(given)))
        patch.setattr(sys, "stdout", out)
        main(["translate", *argv])
    return out.getvalue()


def test_translating_is_what_the_run_itself_wrote(folder: Path, tmp_path: Path) -> None:
    kept = [json.loads(line) for line in (folder / "whole" / "test_translations.jsonl").read_text().splitlines()]
    to_german = [line for line in kept if line["direction"] == "en-de"]
    run, sources = str(folder / "whole"), [line["source"] for line in to_german]
    found = translate("--run", run, "--to", "de", *sources).split("\n")[:-1]
    assert found == [line["beam"] for line in to_german]
    text = tmp_path / "in.txt"
    text.write_text("\n" + "\n\n".join(sources) + "\n\n")
    translate("--run", run, "--to", "de", "--beam_size", "1", "--input", str(text), "--output", str(tmp_path / "out"))
    lines = (tmp_path / "out").read_text().split("\n")
    assert lines[1:-2:2] == [line["greedy"] for line in to_german]
    assert not any(lines[0::2]), "empty lines stay, and the others keep their numbers"
    assert len(lines) == len(text.read_text().split("\n"))
    scored = translate("--run", run, "--to", "de", "--scores", given="\ufeffone two\r\n".encode())
    score, _, words = scored.partition("\t")
    assert float(score) < 0
    assert words == translate("--run", run, "--to", "de", "one two")


@pytest.mark.parametrize(
    ("argv", "given", "what"),
    [
        (["--to", "fr", "one"], b"", "no translation into 'fr' was learned; choose from de, en"),
        (["--to", "de"], b"one\n\xff\n", "line 2: not UTF-8"),
        (["--to", "de"], "one\n".encode("utf-16"), "line 1: not UTF-8 at byte 0; it is UTF-16: convert it by iconv -f"),
        (
            ["--to", "de"],
            b"one\n" + b"one " * 2**18,
            "line 2 has more than 320 tokens, and the model was trained on up",
        ),
        (["--to", "de"], b" " * 2**20 + b"\n" + b"one " * 400, "line 2 has more than 320 tokens"),
        (["--to", "de", "--input", "nowhere.txt"], b"", "cannot read nowhere.txt"),
        (["--to", "de", "--input", "x", "one"], b"", "given beside sentences"),
        (["--to", "de", "--output", "pairs.tsv", "one"], b"", "pairs.tsv exists"),
        (["--to", "de", "--output", "nowhere/x", "one"], b"", "does not exist"),
        (["--to", "de", "--output", "/proc/translations", "one"], b"", "cannot be written"),
        (["--to", "de", "one", "t\udcffwo"], b"", "is not UTF-8"),
    ],
)
def test_translate_refuses(
    argv: list[str], given: bytes, what: str, folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as left:
        translate("--run", "whole", *argv, given=given)
    assert left.value.code == 2
    assert what in capsys.readouterr().err


def test_translate_says_which_lines_are_too_long(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "one " * 60
    assert translate("--run", str(folder / "whole"), "--to", "de", "--beam_size", "1", "one", long).count("\n") == 2
    assert "1 lines (2) are longer than the 40 tokens" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        translate("--run", str(folder / "hash"), "--to", "de", "one", long)
    assert "line 2 has more than 40 tokens" in capsys.readouterr().err


def test_a_run_of_another_recipe_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.unit.checkpoint.builders import small_config, write_checkpoint

    write_checkpoint(tmp_path / "lm", small_config(tmp_path))
    for tool in (["translate", "--to", "de", "one"], ["experts"]):
        with pytest.raises(SystemExit) as left:
            main([*tool, "--run", str(tmp_path / "lm")])
        assert left.value.code == 2
        assert "give a run of recipes/translation.py" in capsys.readouterr().err


@pytest.mark.parametrize("run", ["whole", "choice", "hash"])
def test_experts_by_language_and_kind_of_token(run: str, folder: Path) -> None:
    main(["experts", "--run", str(folder / run)])
    found = json.loads((folder / run / "experts" / "experts.json").read_text())
    layers = {"whole": ["encoder.0", "decoder.0"], "choice": ["encoder.0"], "hash": ["encoder.0", "decoder.0"]}
    assert list(found["layers"]) == layers[run]
    for layer in found["layers"].values():
        for grouping in ("language", "direction", "token class"):
            by_group = torch.tensor(layer[grouping]["counts"])
            assert by_group.sum(dim=0).tolist() == layer["counts"], "every token is in one group"
            assert 0 <= layer[grouping]["mutual_information_bits"] <= layer[grouping]["entropy_bits"] + 1e-9
        assert layer["language"]["groups"] == ["de", "en"]
    for picture in ("load", "by_language", "by_direction", "by_token_class"):
        assert (folder / run / "experts" / f"{picture}.png").stat().st_size > 5000
    assert "| encoder.0 |" in (folder / run / "experts" / "experts.md").read_text()


def test_experts_of_a_dense_model_are_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["experts", "--run", str(folder / "dense")])
    assert "dense model" in capsys.readouterr().err


def test_experts_of_other_data_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder / "whole", tmp_path / "whole", symlinks=True)
    (tmp_path / "whole" / "tokenizer.model").write_bytes((folder / "bpe" / "tokenizer.model").read_bytes())
    with pytest.raises(SystemExit) as left:
        main(["experts", "--run", str(tmp_path / "whole")])
    assert left.value.code == 2
    assert "gives another vocabulary" in capsys.readouterr().err


def test_a_run_opens_as_a_model(folder: Path) -> None:
    model = moe_scale.load_model(folder / "bf16")
    assert type(model).__name__ == "Seq2Seq"
    assert not model.training


def test_the_command_line_runs(folder: Path) -> None:
    """As a user starts it: the installed command."""
    command = [str(Path(sys.executable).with_name("moe-scale")), "translate", "--run", str(folder / "whole"), "--to"]
    done = subprocess.run([*command, "de"], input="one two\n", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    # A reader that leaves early, as `head` does, is no error of ours to tell of.
    with subprocess.Popen([*command, "de", "--batch_size", "1", *["one two"] * 30], stdout=-1, stderr=-1) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert (process.wait(timeout=120), process.stderr.read()) == (128 + signal.SIGPIPE, b"")
