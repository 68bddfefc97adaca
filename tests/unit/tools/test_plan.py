"""``moe-scale plan`` as it is called: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from moe_scale.cli import main
from moe_scale.parallel import device as devices
from moe_scale.parallel import launch as launches
from moe_scale.train.recipe import prepare_job
from recipes.lm_16l import RECIPE
from tests.ranks import REPO
from tests.unit.planner.subjects import MULTIMODAL, SETTINGS

RECIPE_FILE = str(REPO / "recipes" / "lm_16l.py")


def plan(*arguments: str) -> None:
    main(["plan", RECIPE_FILE, *SETTINGS.split(), *arguments])


def test_a_plan_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan("--cluster", "H100", "--tokens", "1e9", "--price", "2", "--output_dir", str(tmp_path / "plan"))
    printed = capsys.readouterr().out
    for words in (
        "parameters",
        "FLOPs a token",
        "logits and loss",
        "moments",
        "all_gather",
        "optimizer",
        "it fits",
        "device-hours, cost",
    ):
        assert words in printed
    record = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert record["layout"]["ranks"] == 8
    assert record["memory"]["fits"]
    assert record["budget"]["tokens"] == 1e9
    assert record["versions"]["torch"]


def test_the_found_layout_is_a_command_that_passes_every_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "plan"
    plan("--cluster", "H100", "--nodes", "2", "--search", "--output_dir", str(folder))
    record = json.loads((folder / "plan.json").read_text())
    command = (folder / "command.txt").read_text().strip()
    printed = capsys.readouterr().out
    assert command in printed
    assert "note: there is no" not in printed  # that hostfile is one of the repository's
    assert command.count("--moe.ep_size") == command.count("--model.activation_checkpointing") == 1
    assert command.startswith(f"deepspeed --hostfile hostfiles/2x8 {RECIPE_FILE} --scale multinode ")
    best = record["search"][0]
    assert best["tokens_per_s"] == record["time"]["tokens_per_s"]
    monkeypatch.setattr(launches, "detect", lambda: launches.Launch(0, 16, 0, 8, "env"))
    monkeypatch.setattr(devices, "detect", lambda: devices.Device("cuda", "NVIDIA H100", bf16=True, fp16=True))
    words = shlex.split(command)
    # The small vocabulary of these tests is none that the task's own check lets through.
    argv = [
        *words[words.index(RECIPE_FILE) + 1 :],
        "--model.vocab_size",
        "50304",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    job = prepare_job(RECIPE, argv)
    assert job.plan.stage == best["stage"]
    assert job.plan.micro_batch == best["micro_batch"]
    assert job.config.moe.ep_size == best["ep_size"]


def test_a_hostfile_that_is_not_there_is_said_to_be_missing(capsys: pytest.CaptureFixture[str]) -> None:
    plan("--nodes", "2", "--devices_per_node", "3", "--search", "--moe.num_experts", "6", "--moe.ep_size", "1")
    assert "note: there is no hostfiles/2x3 here" in capsys.readouterr().out


def test_ranks_are_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan("--simulate", "64", "--moe.ep_size", "4", "--output_dir", str(tmp_path / "plan"))
    assert "16 of 4 ranks; the first: 0, 1, 2, 3" in capsys.readouterr().out
    simulation = json.loads((tmp_path / "plan" / "plan.json").read_text())["simulation"]
    assert len(simulation["params_per_rank"]) == 64
    assert simulation["expert_data_groups"][1][:2] == [1, 5]


def test_a_search_in_which_nothing_fits_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "plan"
    with pytest.raises(SystemExit) as left:
        plan("--device_memory_gb", "1", "--search", "--output_dir", str(folder))
    assert left.value.code == 2
    said = capsys.readouterr()
    assert "layouts fits 1 x 8 H100" in said.err
    assert "layouts that fail" in said.out
    assert "tokens/s" not in said.out
    assert not folder.exists()


def test_only_what_was_written_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").touch()
    plan("--output_dir", str(tmp_path))
    assert f"wrote plan.json to {tmp_path}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--cluster H1000", "--cluster: 'H1000'; choose one of"),
        ("--nodes 0", "choose 1 or more"),
        ("--devices_per_node -1", "choose 1 or more"),
        ("--price -1", "choose a number above 0"),
        ("--tokens nan", "choose a number above 0"),
        ("--inter_gbps fast", "choose a number above 0"),
        ("--imbalance 0.5", "the fullest rank has at least the mean"),
        ("--moe.ep_size 3", "does not divide the 8 ranks"),
        ("--moe.backend autoep", "modelled for the custom backend alone"),
        ("--simulate 13", "13 ranks do not fill nodes of 8"),
        ("--simulate 32768", "choose at most 16,384"),
        ("--simulate 16 --nodes 2", "leave one of them out"),
        ("--simulate 16 --routing nothing.jsonl", "nothing.jsonl: No such file"),
        ("--calibration nothing.json", "nothing.json: No such file"),
        ("--no_such_setting 1", "no such setting"),
        ("--deepspeed_override zero_optimization.stage=7", "choose 0, 1, 2 or 3"),
        ("--output_dir {file}/plan", "cannot be written"),
        ("--output_dir {plan}", "holds a plan already"),
        ("--search --output_dir {command}", "holds a plan already: command.txt"),
        ("--zipf 1", "--zipf: without effect without --simulate"),
        ("--routing x", "--routing: without effect without --simulate"),
        ("--straggler_spread 0.1", "--straggler_spread: without effect without --simulate"),
        ("--simulation_seed 1", "--simulation_seed: without effect without --simulate"),
        ("--simulate 8 --zipf 1 --routing x", "--zipf: with --routing"),
        ("--simulate 8 --straggler_spread 2", "choose 0 to 1"),
        ("--simulate 8 --zipf 1 --moe.enabled false", "--zipf: without effect on a dense model"),
        ("--simulate 8 --imbalance 2 --moe.ep_size 2", "--imbalance: with --simulate"),
        ("--imbalance 2 --moe.ep_size 1", "2.0 at ep_size 1"),
        ("--search --calibration x", "--search: with --calibration"),
    ],
)
def test_wrong_settings_are_one_message(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "plan.json").touch()
    (tmp_path / "searched").mkdir()
    (tmp_path / "searched" / "command.txt").touch()
    words = arguments.format(file=tmp_path / "file", plan=tmp_path, command=tmp_path / "searched").split()
    with pytest.raises(SystemExit) as left:
        plan(*words)
    assert left.value.code == 2
    said = capsys.readouterr()
    assert message in said.err
    assert "Traceback" not in said.err
    assert "tokens/s" not in said.out


def plan_multimodal(*arguments: str) -> None:
    main(["plan", str(REPO / "recipes" / "multimodal.py"), *MULTIMODAL.split(), *arguments])


def test_model_states_of_another_recipe_are_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--cluster", "B200", "--nodes", "2", "--moe.ep_size", "4", "--output_dir", str(tmp_path / "plan")]
    plan_multimodal(*arguments, "--deepspeed_override", "zero_optimization.stage=3")
    printed = capsys.readouterr().out
    for words in (
        "multimodal on 2 x 8 B200",
        "ZeRO-3, ep 4, bf16, adamw, 4 micro-batches a step",
        "gathered parameters, at most",
        "ZeRO-1, ep 1, offloaded",
        "fits",
        "MI300X",
        "are left for activations",
        "checkpoint: ",
        f"wrote plan.json to {tmp_path / 'plan'}",
    ):
        assert words in printed
    assert "tokens/s" not in printed
    record = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert record["model"] == "text-image"
    assert record["layout"]["ranks"] == 16
    assert record["parameters"]["total"] == sum(record["parameters"]["by_part"].values())
    assert [row["stage"] for row in record["memory"]["shardings"]] == [0, 1, 1, 2, 2, 3, 3]
    assert all(row["fits"] and row["left_for_activations"] > 0 for row in record["memory"]["shardings"])
    assert [row["devices"] for row in record["machines"]["A100-40"]] == [1] * 7
    assert [row["ep_size"] for row in record["machines"]["A100-40"]] == [1] * 7
    assert record["versions"]["torch"]


def test_a_model_that_does_not_fit_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    plan_multimodal("--cluster", "H100", "--device_memory_gb", "2.01")
    printed = capsys.readouterr().out
    assert "IT DOES NOT FIT: needs" in printed
    assert "ZeRO-0, ep 1: needs" in printed
    assert "none" in printed


@pytest.mark.parametrize(
    "option",
    [
        *("--search", "--simulate 16", "--tokens 1e9", "--price 2", "--one_document", "--imbalance 1.5"),
        *("--calibration rates.json", "--memory_gbps 1", "--intra_gbps 1", "--inter_gbps 1", "--host_gbps 1"),
        *("--intra_latency_us 1", "--inter_latency_us 1", "--peak_tflops 1"),
    ],
)
def test_options_of_activations_and_time_are_refused_where_states_alone_are_planned(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        plan_multimodal(*option.split(), "--output_dir", str(tmp_path / "plan"))
    assert left.value.code == 2
    said = capsys.readouterr()
    assert f"{option.split()[0]}: without effect on multimodal, whose model is no decoder" in said.err
    assert said.out == ""
    assert not (tmp_path / "plan").exists()


def test_options_of_states_are_not_refused(capsys: pytest.CaptureFixture[str]) -> None:
    memories = ("--device_memory_gb", "60", "--host_memory_gb", "900", "--reserved_gb", "3")
    plan_multimodal(*memories, "--disk_gbps", "2", "--devices_per_node", "4")
    printed = capsys.readouterr().out
    assert "of 55.9 GiB a device" in printed
    assert "at 2 GB/s a rank" in printed


def test_a_calibration_needs_a_decoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(REPO / "recipes" / "multimodal.py")
    with pytest.raises(SystemExit) as left:
        main(["bench", "--calibrate", recipe, "--output_dir", str(tmp_path / "calibration"), "--scale", "cpu"])
    assert left.value.code == 2
    assert "multimodal, whose model is no decoder" in capsys.readouterr().err


def test_a_file_that_is_no_recipe_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "nothing.py"])
    assert "nothing.py is no file" in capsys.readouterr().err


def test_a_calibration_that_cannot_be_written_is_refused_before_it_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as left:
        main(["bench", "--calibrate", RECIPE_FILE, "--output_dir", str(tmp_path / "file" / "calibration")])
    assert left.value.code == 2
    assert "cannot be written" in capsys.readouterr().err
