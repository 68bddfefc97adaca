"""``moe-scale prune``: what it writes, how it measures, and what it refuses before anything is there."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_scale
from moe_scale.checkpoint.index import read_index
from moe_scale.cli import main
from moe_scale.config import DecoderLoRAConfig, LMConfig
from moe_scale.data.packing import Batch
from moe_scale.data.text import eval_batches, open_text
from moe_scale.data.tokenizer import load_tokenizer
from moe_scale.models.lora import adapters, merge_adapters
from moe_scale.models.pruning import pruned_layer, sparse_layers
from moe_scale.tools.prune_choice import Method, choose
from moe_scale.tools.prune_report import Row, verdicts
from moe_scale.tools.stored_run import LM, open_run
from moe_scale.train.model_folder import write_model_folder
from tests.curves import write_words
from tests.ranks import REPO
from tests.unit.checkpoint.builders import small_config, write_checkpoint


def make_config(folder: Path, **moe: Any) -> LMConfig:
    config = small_config(folder)
    return replace(
        config,
        model=replace(config.model, vocab_size=257),
        moe=replace(config.moe, **moe),
        data=replace(
            config.data,
            source=str(folder / "text.jsonl"),
            tokenizer="bytes",
            seq_len=32,
            cache_dir=str(folder / "cache"),
        ),
        eval=replace(config.eval, max_tokens=500),
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a sigmoid router, whose four experts a layer are drawn, and its text."""
    path = tmp_path_factory.mktemp("prune")
    write_words(path / "text.jsonl", 40)
    write_checkpoint(path / "run", make_config(path))
    return path


def test_adapters_are_merged_before(folder: Path, tmp_path: Path) -> None:
    lora = DecoderLoRAConfig(rank=2, targets=("attention.*", "experts.*"))
    write_checkpoint(tmp_path / "run", replace(make_config(folder), lora=lora))
    run, whole = open_run(str(tmp_path / "run"), LM), moe_scale.load_model(tmp_path / "run")
    assert adapters(whole)
    merge_adapters(whole)
    prune(tmp_path, tmp_path / "pruned")
    pruned = moe_scale.load_model(tmp_path / "pruned")
    assert not adapters(pruned)
    assert open_run(str(tmp_path / "pruned"), LM).config.lora != run.config.lora
    theirs = dict(whole.named_parameters())
    for name, weight in pruned.named_parameters():
        if ".experts." in name:
            assert all(any(torch.equal(expert, other) for other in theirs[name]) for expert in weight), name
        elif "router" not in name:
            torch.testing.assert_close(weight, theirs[name], rtol=0, atol=0, msg=name)


def prune(folder: Path, target: Path, *flags: str) -> dict[str, Any]:
    main(["prune", str(folder / "run"), "--output_dir", str(target), "--calibration_tokens", "100", *flags])
    return json.loads((target / "prune.json").read_text())


def test_a_pruned_model_opens_everywhere(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = prune(folder, tmp_path / "model")
    before, after = moe_scale.load_model(folder / "run"), moe_scale.load_model(tmp_path / "model")
    full, usage = said["models"]
    assert said["calibration_tokens"] == 128  # whole sequences
    assert (full["num_experts"], usage["num_experts"]) == (4, 2)
    for name, layer in sparse_layers(after).items():
        counts = usage["layers"][name]["usage"]
        kept = [group[0] for group in usage["layers"][name]["groups"]]
        assert sum(counts) == 128 * 2
        assert sum(counts[expert] for expert in kept) == sum(sorted(counts)[2:])
        old = sparse_layers(before)[name]
        for mine, theirs in ((layer.experts.down, old.experts.down), (layer.router.weight, old.router.weight)):
            assert torch.equal(mine, theirs[kept])
        assert torch.equal(layer.selection_bias_E, old.selection_bias_E[kept])
    assert usage["parameters"] == sum(p.numel() for p in after.parameters())
    assert usage["bytes"] == sum(read_index(tmp_path / "model/checkpoints/step_00000000").sizes.values()) - header(
        tmp_path / "model"
    )
    table = (tmp_path / "model" / "prune.md").read_text()
    assert f"| usage | 2 | {usage['parameters']:,} |" in table
    assert f"{usage['loss']:.4f}" in table
    capsys.readouterr()
    main(["generate", "--run", str(tmp_path / "model"), "--prompt", "et", "--max_tokens", "5"])
    assert capsys.readouterr().out


def test_a_model_folder_is_pruned_with_its_own_tokenizer(folder: Path, tmp_path: Path) -> None:
    """Twice, to one expert of four; what is written does not need what it was made from."""
    config = make_config(folder)
    characters = [chr(code) for code in range(33, 127)] + ["\u0120", "\u010a"]

    def tokenizer(target: Path) -> None:
        target.mkdir()
        (target / "vocab.json").write_text(json.dumps({character: n for n, character in enumerate(characters)}))
        (target / "merges.txt").write_text("#version: 0.2\n")

    state = moe_scale.load_model(folder / "run").state_dict()
    write_model_folder(tmp_path / "four", "decoder", config, state.__getitem__, origin={}, tokenizer=tokenizer)
    for source, target in (("four", "two"), ("two", "one")):
        main(["prune", str(tmp_path / source), "--output_dir", str(tmp_path / target), "--calibration_tokens", "64"])
        shutil.rmtree(tmp_path / source)
    model = moe_scale.load_model(tmp_path / "one")
    assert {(layer.config.num_experts, layer.config.top_k) for layer in sparse_layers(model).values()} == {(1, 1)}
    assert open_run(str(tmp_path / "one"), LM).tokenizer == str(tmp_path / "one" / "tokenizer")
    assert load_tokenizer(str(tmp_path / "one" / "tokenizer")).encode("et") == [characters.index(c) for c in "et"]


def header(model: Path) -> int:
    """Bytes of the weights' file that are no weights."""
    file = next(model.rglob("*.safetensors")).read_bytes()
    return 8 + int.from_bytes(file[:8], "little")


def test_losses_are_those_of_the_models(folder: Path, tmp_path: Path) -> None:
    said = prune(folder, tmp_path / "model", "--by", "output_norm", "--merge", "--keep", "0.25")
    config = make_config(folder)
    text = open_text(config.data, load_tokenizer("bytes"))
    for path, row in ((folder / "run", said["models"][0]), (tmp_path / "model", said["models"][1])):
        model, nats, targets = moe_scale.load_model(path), 0.0, 0.0
        for batch in eval_batches(text, config.data, micro_batch=3, rank=0, world_size=1, max_tokens=500):
            with torch.no_grad():
                output = model(batch.ids_BS, batch.targets_BS, batch.document_ids_BS)
            nats += float(output.lm_loss * output.num_targets)
            targets += float(output.num_targets)
        assert row["loss"] == pytest.approx(nats / targets, rel=1e-5)
        assert said["heldout_tokens"] == targets
    origin = json.loads((tmp_path / "model" / "run.json").read_text())["origin"]
    assert (origin["by"], origin["merge"]) == ("output_norm", True)
    groups = said["models"][1]["layers"]["layers.0.moe"]["groups"]
    assert [sorted(group) for group in groups] == [[0, 1, 2, 3]]


def test_calibration_text_is_from_the_training_split(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Batch] = []

    def watched(model: Any, batches: Any, methods: Any, num_kept: int) -> Any:
        seen.extend(batches)
        return choose(model, seen, methods, num_kept)

    monkeypatch.setattr("moe_scale.tools.prune.choose", watched)
    prune(folder, tmp_path / "model")
    text = open_text(make_config(folder).data, load_tokenizer("bytes"))
    train, heldout = (bytes(t % 256 for t in split.tokens_T) for split in (text.train, text.heldout))
    rows = [bytes(t % 256 for t in row.tolist()) for batch in seen for row in batch.ids_BS]
    assert len(rows) == 4
    assert all(row in train and row not in heldout for row in rows)


def test_comparing_makes_a_model_of_each_way(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = prune(folder, tmp_path / "all", "--compare", "--seeds", "2")
    names = [row["name"] for row in said["models"]]
    ways = ["usage", "output_norm", "reconstruction", "usage-merge", "random-0", "random-1"]
    assert names == ["all experts", *ways]
    assert {path.name for path in (tmp_path / "all").iterdir()} == {*ways, "prune.json", "prune.md"}
    assert {row["num_experts"] for row in said["models"][1:]} == {2}
    assert said["models"][4]["layers"] != said["models"][1]["layers"]
    told = capsys.readouterr().out
    assert "Random over 2 seeds: after pruning" in told
    assert re.search(r"usage: after pruning 0\.\d{4} (below|above) their mean, better than [012] of 2\.", told)
    again = prune(folder, tmp_path / "again", "--by", "random", "--seed", "1")
    assert again["models"][1]["layers"] == said["models"][-1]["layers"]


def test_what_moves_is_the_layers_output(folder: Path) -> None:
    """Of all rankings reconstruction moves a layer least when one expert goes: it has tried them all."""
    model = moe_scale.load_model(folder / "run", dropless=True)
    ids_BS = torch.randint(257, (3, 32), generator=torch.Generator().manual_seed(0))
    batches = [Batch(ids_BS, ids_BS, torch.zeros_like(ids_BS))]
    methods = [Method(by) for by in ("usage", "output_norm", "reconstruction")] + [
        Method("random", seed=seed) for seed in range(4)
    ]
    choices = choose(model, batches, methods, 3)
    layer, inputs = model.get_submodule("layers.1.moe"), []
    layer.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    with torch.no_grad():
        model(ids_BS)
        for method in methods:
            found = choices[method]["layers.1.moe"]
            before, after = layer(inputs[0])[0], pruned_layer(layer, found.groups)(inputs[0])[0]
            assert found.moved == pytest.approx(
                float((after - before).square().sum() / before.square().sum()), rel=1e-4
            )
            for name in choices[method]:
                assert choices[methods[2]][name].moved <= choices[method][name].moved


def test_verdicts_count_the_draws_that_are_worse() -> None:
    def row(by: str, loss: float, recovered: float, seed: int = 0) -> Row:
        method = Method(by, seed=seed)
        return Row(method.name, method, 2, 1, 1, 1, loss, recovered, {}, "")

    rows = [row("usage", 2.5, 1.0), row("random", 2.0, 3.0), row("random", 3.0, 5.0, 1), row("random", 4.0, 4.0, 2)]
    assert verdicts(rows, 10) == [
        "Random over 3 seeds: after pruning 3.0000 +- 1.0000 (2.0000 to 4.0000); after 10 steps 4.0000 +- 1.0000 "
        "(3.0000 to 5.0000).",
        "usage: after pruning 0.5000 below their mean, better than 2 of 3; after 10 steps 3.0000 below their mean, "
        "better than 3 of 3.",
    ]
    assert not verdicts(rows[:1], 0)
    unfinished = [*rows[:3], replace(rows[3], recovered_loss=None)]
    assert [line.count(";") for line in verdicts(unfinished, 10)] == [0, 0]
    assert [line.count(";") for line in verdicts([replace(rows[0], recovered_loss=None), *rows[1:]], 10)] == [1, 0]


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(["prune", *argv])
    assert left.value.code == 2
    return capsys.readouterr().err


def test_refusals_leave_no_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, new = str(folder / "run"), ("--output_dir", str(tmp_path / "new"))
    (tmp_path / "there").mkdir()
    assert "exists; name a new folder" in refused(capsys, run, "--output_dir", str(tmp_path / "there"))
    assert "holds no checkpoint" in refused(capsys, str(tmp_path), *new)
    assert "keeps all 4 experts" in refused(capsys, run, *new, "--keep", "0.9")
    assert "choose a number above 0, up to 1" in refused(capsys, run, *new, "--keep", "0")
    assert "--by: with --compare" in refused(capsys, run, *new, "--by", "usage", "--compare")
    assert "--seeds: without --compare" in refused(capsys, run, *new, "--seeds", "3")
    assert "--seed: with --by usage" in refused(capsys, run, *new, "--seed", "3")
    assert "--merge: with --by random" in refused(capsys, run, *new, "--by", "random", "--merge")
    assert "--optim.lr: without --recover" in refused(capsys, run, *new, "--optim.lr", "1e-3")
    assert "unexpected word 'x'" in refused(capsys, run, *new, "x")
    assert "--ranks: without --recover" in refused(capsys, run, *new, "--ranks", "2")
    assert "'nowhere' is not there" in refused(capsys, run, *new, "--device", "nowhere")
    # What the recovery would refuse is refused before anything is pruned.
    assert "optim.lrr" in refused(capsys, run, *new, "--recover", "3", "--optim.lrr", "1e-3")
    assert "is no file" in refused(capsys, run, *new, "--recover", "3", "--recipe", "none.py")
    assert {path.name for path in tmp_path.iterdir()} == {"there"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"enabled": False}, "holds a dense model"),
        ({"router": "hash"}, "moe.router hash"),
        ({"router": "expert_choice", "dispatch": "capacity"}, "moe.router expert_choice"),
    ],
)
def test_models_without_experts_to_drop_are_refused(
    settings: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "run", make_config(tmp_path, **settings))
    assert said in refused(capsys, str(tmp_path / "run"), "--output_dir", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_failure_to_write_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moe_scale.train.model_folder.write_part", full)
    error = refused(capsys, str(folder / "run"), "--output_dir", str(tmp_path / "new"), "--calibration_tokens", "64")
    assert "cannot be written: No space left on device" in error
    assert not list(tmp_path.iterdir())


def test_a_recovery_that_fails_leaves_the_pruned_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe is there when it is checked, and ends badly when it is run."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "if __name__ == '__main__':\n    raise SystemExit('out of luck')\nfrom recipes.lm_16l import RECIPE\n"
    )
    target = tmp_path / "model"
    with pytest.raises(SystemExit) as left:
        prune(
            folder,
            target,
            "--recover",
            "2",
            "--recipe",
            str(recipe),
            "--deepspeed_config",
            str(REPO / "ds_configs/zero3_cpu_fp32.json"),
        )
    assert left.value.code == 1
    assert "recovery failed with exit code 1" in (said := capsys.readouterr().err)
    assert "out of luck" in said
    assert sparse_layers(moe_scale.load_model(target))
    row = json.loads((target / "prune.json").read_text())["models"][1]
    assert row["loss"] > 0
    assert row["recovered_loss"] is None
