"""The page of a run, and the run in the terminal: of whole runs, of damaged ones, and of folders that are none."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moe_scale import cli
from moe_scale.errors import ConfigError
from moe_scale.telemetry.terminal import Console
from moe_scale.tools import report_data
from moe_scale.tools.report import PAGE, write
from moe_scale.tools.report_charts import POINTS, charts_of, shorten, shorten_columns
from moe_scale.tools.report_data import RunData, Series, open_runs, read_run
from moe_scale.tools.report_live import Tail, follow, spark
from moe_scale.tools.report_maps import heat_blocks
from moe_scale.tools.report_page import differences, render, settings_of, state_of
from moe_scale.tools.report_plots import SERIES, VARIABLES, load_shares, number
from tests.unit.tools.report_runs import evaluation_record, write_run

NOW = datetime(2026, 1, 2, 4, 0, tzinfo=UTC)


def page_of(*folders: Path) -> str:
    runs = open_runs([str(folder) for folder in folders])
    return render(runs, charts_of(runs), NOW)


def data_of(page: str) -> dict[str, Any]:
    """What the page's script shows under the pointer."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def append(folder: Path, *lines: str) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(lines)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", steps=40, layers=3, experts=4), "run")
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if "loss" in record]
    assert run.scalars["loss"].values.tolist() == [record["loss"] for record in trained]
    assert run.scalars["loss"].steps.tolist() == list(range(1, 41))
    assert run.scalars["eval/loss"].steps.tolist() == [20, 40]
    assert run.layers["router/entropy"].values.tolist() == [record["router/entropy"] for record in trained]
    assert run.loads is not None
    assert run.loads.values.tolist() == [record["router/tokens_per_expert"] for record in trained]
    assert run.records == len(records)
    assert run.notes == []
    assert run.layer_names(3) == ["layer 1", "layer 3", "layer 5"]
    assert [event.kind for event in run.events] == ["start", "saved", "start", "skipped", "finished"]


def test_what_a_resumed_run_overtook_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=40, evaluate_every=10)
    again = [json.dumps({"step": step, "loss": 100.0 + step}) + "\n" for step in range(16, 26)]
    append(folder, *again)
    run = read_run(folder, "run")
    loss = run.scalars["loss"]
    assert loss.steps.tolist() == list(range(1, 26))
    assert loss.values[15:].tolist() == [100.0 + step for step in range(16, 26)]
    assert (loss.values[:15] < 100).all()
    assert run.scalars["eval/loss"].steps.tolist() == [10]  # those of 20, 30 and 40 are overtaken
    assert any("overtook" in note for note in run.notes)


def test_the_last_record_of_early_stopping_repeats_scores_of_another_step(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=40)
    append(folder, json.dumps(evaluation_record(20, 40, 2) | {"step": 40, "eval/restored_step": 20}) + "\n")
    run = read_run(folder, "run")
    assert run.scalars["eval/loss"].values[-1] == evaluation_record(40, 40, 2)["eval/loss"]
    assert "with the weights of step 20" in state_of(run, 0.0)[1]


def test_damaged_lines_are_left_out_and_noted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=4)
    damage = ["not json\n", "[1, 2]\n", '{"loss": 1}\n', '{"step": true, "loss": 7}\n', "[" * 100_000 + "\n"]
    append(folder, *damage, '{"step": 5, "lo')
    run = read_run(folder, "run")
    assert run.scalars["loss"].steps.tolist() == [1, 2, 3, 4]
    assert any("cut short" in note for note in run.notes)
    assert any(note.startswith("5 damaged lines") for note in run.notes)


def test_values_that_are_no_numbers_leave_gaps(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=4)
    append(folder, '{"step": 5, "loss": null, "router/entropy": [null, 0.5], "note": "text", "more": {"a": 1}}\n')
    append(folder, '{"step": 6, "loss": NaN, "router/entropy": [0.25, 0.5], "more": {"a": 2}}\n')
    run = read_run(folder, "run")
    assert np.isnan(run.scalars["loss"].values[-2:]).all()
    assert np.isnan(run.layers["router/entropy"].values[-2, 0])
    assert run.layers["router/entropy"].values[-1].tolist() == [0.25, 0.5]
    assert "note" not in run.scalars
    assert run.scalars["more/a"].values.tolist() == [1.0, 2.0]
    assert data_of(page_of(folder))


def test_of_a_large_file_layers_are_sampled_and_numbers_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "run", steps=500, layers=2, experts=8, evaluate_every=50)
    whole = read_run(folder, "run")
    size = (folder / "metrics.jsonl").stat().st_size
    monkeypatch.setattr(report_data, "PARSED_WHOLE_BYTES", size // 5)
    sampled = read_run(folder, "run")
    for name, series in whole.scalars.items():
        assert sampled.scalars[name].values.tolist() == series.values.tolist()
    assert whole.loads is not None
    assert sampled.loads is not None
    assert 80 < len(sampled.loads.steps) < 130
    at = np.searchsorted(whole.loads.steps, sampled.loads.steps)
    assert (whole.loads.values[at] == sampled.loads.values).all()
    assert any("one record in" in note for note in sampled.notes)


def test_a_dense_run_without_run_json_or_events(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    append(folder, *(json.dumps({"step": n, "loss": 1.0, "skipped_steps": n // 3}) + "\n" for n in range(1, 7)))
    run = read_run(folder, "run")
    assert run.loads is None
    assert run.facts == {}
    assert [(event.kind, event.step) for event in run.events] == [("skipped", 3), ("skipped", 6)]
    assert any("no run.json" in note for note in run.notes)
    page = page_of(folder)
    assert "Load of the experts" not in page
    assert "no run.json" in page


def test_a_run_that_has_not_logged_yet(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", finished=False)
    (folder / "metrics.jsonl").unlink()
    page = page_of(folder)
    assert "no step is logged yet" in page
    (folder / "metrics.jsonl").write_text("")
    assert "no step is logged yet" in page_of(folder)


def test_a_damaged_run_json_is_noted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "run.json").write_text('{"settings"')
    assert read_run(folder, "run").notes == ["run.json is damaged, and left out."]


@pytest.mark.parametrize("kind", ["empty", "missing", "file", "parent", "twice"])
def test_folders_that_are_no_runs_are_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "runs/one")
    (tmp_path / "empty").mkdir()
    paths = {
        "empty": [tmp_path / "empty"],
        "missing": [tmp_path / "nowhere"],
        "file": [run / "metrics.jsonl"],
        "parent": [tmp_path / "runs"],
        "twice": [run, run / ".." / "one"],
    }[kind]
    said = {
        "empty": "is no run: it has neither",
        "missing": "there is no folder",
        "file": "is a file",
        "parent": f"holds 1; give them: {run}",
        "twice": "is given twice",
    }[kind]
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", *map(str, paths), "--output_dir", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- making series short ---------------------------------------------------------------------------------------------


def test_a_short_series_is_drawn_as_it_is() -> None:
    series = Series(np.arange(2 * POINTS), np.arange(2.0 * POINTS))
    short = shorten(series)
    assert short.values.tolist() == series.values.tolist()
    assert short.low is None
    assert short.per_point == 1


def test_a_long_series_keeps_its_mean_and_every_extreme() -> None:
    values = np.random.default_rng(0).normal(size=10_007)
    values[1234], values[9999], values[50] = 40.0, -30.0, np.nan
    short = shorten(Series(np.arange(10_007), values))
    assert short.low is not None
    assert short.high is not None
    assert len(short.steps) <= 2 * POINTS
    assert np.nanmax(short.high) == 40.0
    assert np.nanmin(short.low) == -30.0
    for n, first in enumerate(range(0, 10_007, short.per_point)):
        stretch = values[first : first + short.per_point]
        assert short.values[n] == pytest.approx(np.nanmean(stretch))
        assert short.high[n] == np.nanmax(stretch)


def test_a_stretch_without_numbers_is_a_gap() -> None:
    values = np.ones(2000)
    values[:500] = np.nan
    short = shorten(Series(np.arange(2000), values))
    assert np.isnan(short.values[0])
    assert short.values[-1] == 1.0


def test_columns_are_means() -> None:
    values = np.random.default_rng(0).random((1000, 2, 3))
    short = shorten_columns(Series(np.arange(1000), values), columns=10)
    assert short.values.shape == (10, 2, 3)
    np.testing.assert_allclose(short.values[3], values[300:400].mean(axis=0))


def test_loads_are_placed_by_octaves_around_the_even_one() -> None:
    places = load_shares(np.array([0.0, 1 / 8, 0.5, 1.0, 2.0, 8.0, 100.0]))
    np.testing.assert_allclose(places, [0, 0, 1 / 3, 0.5, 2 / 3, 1, 1])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12_000, "12k"), (3.4e6, "3.4M"), (2.5e-5, "2.5e-5"), (0.02, "0.02"), (1500, "1,500"), (7e9, "7G")],
)
def test_numbers_on_axes(value: float, text: str) -> None:
    assert number(value) == text


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_shows_what_was_logged(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=40, layers=3, experts=4)
    page = page_of(folder)
    run = read_run(folder, "run")
    for text in ("finished at step 40", "Load of the experts", "layer 3", "Gradient norm", "the loss is not a number"):
        assert text in page
    data = data_of(page)
    lines = {line["n"]: line for chart in data.values() for line in chart.get("lines", [])}
    assert lines["training"]["x"] == list(range(1, 41))
    np.testing.assert_allclose(lines["training"]["y"], run.scalars["lm_loss"].values, rtol=1e-4)
    assert lines["held out"]["x"] == [20, 40]
    assert set(lines) >= {"all", "embedding", "attention", "router", "experts"}
    maps = [item for item in data.values() if item.get("rows") == [f"expert {e}" for e in range(4)]]
    assert len(maps) == 3
    assert run.loads is not None
    loads_E = run.loads.values[7, 1]
    np.testing.assert_allclose(maps[1]["values"][7], loads_E / loads_E.mean(), rtol=1e-2)


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "http" not in without_names
    assert not re.search(r"""(src|href|srcset)=["'](?!data:|#)""", without_names)
    assert not re.search(r"url\((?!#)", without_names)


def test_svgs_have_no_fixed_colours_and_no_ids_twice(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    svgs = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(svgs) > 10
    colours = {colour for svg in svgs for colour in re.findall(r"(?<!url\()#[0-9a-f]{6}\b", svg)}
    assert not colours, colours
    ids = [name for svg in svgs for name in re.findall(r'\bid="([^"]+)"', svg)]
    assert len(ids) == len(set(ids))
    used = {name for svg in svgs for name in re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg)}
    assert used
    assert used <= set(ids)


def test_the_style_has_every_colour_of_the_pictures_in_both_schemes() -> None:
    css = (Path(report_data.__file__).parent / "page/report.css").read_text()
    light, dark = css.split("@media (prefers-color-scheme: dark)")[:2]
    for colour, variable in VARIABLES.items():
        assert f"{variable}: " in light, colour
        assert f"{variable}: " in dark.split("}")[0], colour
    assert len(SERIES) == 8


def test_text_of_a_run_cannot_become_part_of_the_page(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><b a='\">"
    folder = write_run(tmp_path / "run", settings={"eval": {"prompt": evil}})
    append(folder, json.dumps({"step": 41, f"eval/{evil}": 1.0}) + "\n")
    append(folder, json.dumps({"step": 42, f"eval/{evil}": 2.0}) + "\n")
    page = page_of(folder)
    assert "<script>alert" not in page
    assert page.count("</script>") == 2
    assert data_of(page)


def test_heatmaps_have_a_pixel_a_value(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", steps=30, layers=2, experts=5))
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    sizes = [Image.open(io.BytesIO(base64.b64decode(text))).size for text in pictures]
    assert sizes[:2] == [(30, 5), (30, 5)]
    assert (30, 2) in sizes


def test_settings_that_differ(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a/run", settings={"optim": {"lr": 1e-3}})
    two = write_run(tmp_path / "b/run", settings={"optim": {"lr": 2e-3}, "moe": {"top_k": 1}}, seed=1)
    runs = open_runs([str(one), str(two)])
    assert [run.name for run in runs] == ["a/run", "b/run"]
    found = differences([settings_of(run.facts) for run in runs])
    assert found == [("optim.lr", ["0.001", "0.002"]), ("moe.top_k", ["-", "1"])]
    page = page_of(one, two)
    assert "Settings that differ" in page
    lines = [line["n"] for chart in data_of(page).values() for line in chart.get("lines", [])]
    assert set(lines) == {"a/run", "b/run"}


def test_what_changed_between_starts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    facts = json.loads((folder / "run.json").read_text())
    facts["settings"]["optim"]["lr"] = 0.5
    (folder / "run.1.json").write_text(json.dumps(facts))
    page = page_of(folder)
    assert "What changed between starts" in page
    assert re.search(r"<th>optim\.lr</th><td>0\.5</td><td>0\.003</td>", page)


@pytest.mark.parametrize(
    ("records", "titles"),
    [
        ({"eval/bleu": 1.0, "eval/bleu/en-de": 2.0, "eval/chrf": 3.0}, ["BLEU", "chrF"]),
        ({"eval/accuracy": 0.5, "eval/f1": 0.4, "eval/ece": 0.1}, ["Accuracy and F1", "Calibration error"]),
        ({"eval/text_to_image_r1": 0.5, "eval/text_to_image_r1/de": 0.1}, ["Recall at 1, text to image"]),
        ({"eval/glue": 0.5}, ["eval/glue"]),
    ],
)
def test_scores_of_every_recipe_have_a_chart(records: dict[str, float], titles: list[str], tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    append(folder, *(json.dumps({"step": 40 + n, **records}) + "\n" for n in (1, 2)))
    runs = open_runs([str(folder)])
    evaluation = dict(charts_of(runs))["Evaluation"]
    assert [chart.title for chart in evaluation if chart.title not in ("Perplexity", "Attention sink")] == titles
    logged = sum(len(chart.lines) for chart in evaluation)
    assert logged == len(records) + 2


def test_a_run_of_one_record(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=1)
    page = page_of(folder)
    assert "logged once, at step 1" in page
    assert "<svg" not in page


def test_many_layers_and_experts_fit_without_their_values(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=400, layers=10, experts=64)
    run = read_run(folder, "run")
    blocks = heat_blocks(run)
    assert len(blocks[0].maps) == 10
    assert all(map.values is None for map in blocks[0].maps)
    assert all(map.values for block in blocks[1:] for map in block.maps)


# --- writing ---------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_page_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    cli.main(["report", str(folder)])
    page = folder / "report" / PAGE
    assert capsys.readouterr().out.strip() == str(page)
    names = {path.name for path in page.parent.glob("*.png")}
    assert names >= {"lm_loss.png", "grad_norm.png", "tokens_per_s.png", "experts.png", "layers.png"}
    for name in names:
        with Image.open(page.parent / name) as picture:
            assert len(np.unique(np.asarray(picture))) > 10
    cli.main(["report", str(folder)])  # again, over the first


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(folder), "--output_dir", str(folder)])
    assert ended.value.code == 2
    assert "holds other things" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_hundred_thousand_steps_are_reported_in_seconds(tmp_path: Path) -> None:
    """CPU time of the process, so that the machine's other work does not count."""
    folder = write_run(tmp_path / "run", steps=100_000, layers=4, experts=16, evaluate_every=1000)
    assert (folder / "metrics.jsonl").stat().st_size > 100_000_000
    began = time.process_time()
    page = write(open_runs([str(folder)]), tmp_path / "out", NOW)
    seconds = time.process_time() - began
    (folder / "metrics.jsonl").unlink()
    assert seconds < 5
    assert page.stat().st_size < 2_000_000
    text = page.read_text()
    assert "mean of 334 records a point" in text
    assert "read from one record in" in text


# --- live ------------------------------------------------------------------------------------------------------------


def test_the_tail_of_a_file_gives_whole_lines_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.new() == ([], False)
    path.write_text('{"step": 1}\n{"st')
    assert tail.new() == ([{"step": 1}], True)
    with open(path, "a") as file:
        file.write('ep": 2}\nnot json\n{"step": 3}\n')
    assert tail.new() == ([{"step": 2}, {"step": 3}], False)
    assert tail.new() == ([], False)
    new = tmp_path / "new"
    new.write_text('{"step": 1}\n')
    new.replace(path)  # as a run that goes back does
    assert tail.new() == ([{"step": 1}], True)


def test_following_a_run_from_before_its_first_record_to_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_run(tmp_path / "whole", steps=40)
    folder = tmp_path / "run"
    folder.mkdir()
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    looks = 0

    def meanwhile(seconds: float) -> None:
        nonlocal looks
        assert seconds == 0.5
        looks += 1
        if looks == 1:
            shutil.copy(whole / "run.json", folder)
        elif looks == 2:
            append(folder, *lines[:3], lines[3][:50])
        elif looks == 3:
            append(folder, lines[3][50:], *lines[4:])
        elif looks == 4:
            shutil.copy(whole / "finished.json", folder)
        assert looks < 5

    end = follow(str(folder), 0.5, sleep=meanwhile)
    out = capsys.readouterr().out
    assert "step 3/40  loss" in out
    assert re.search(r"step 40/40  loss \d\.\d{4}  held out \d\.\d{4}  12,\d{3} tokens/s  fullest expert", out)
    assert end == f"{folder} has finished, at step 40"
    assert out.rstrip().endswith(end)


def test_following_a_run_that_stops(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", finished=False)
    event = {"time": "", "event": "stopped", "step": 40, "text": "a full disk"}
    with open(folder / "events.jsonl", "a") as file:
        file.write(json.dumps(event) + "\n")
    assert follow(str(folder), 1.0, sleep=lambda _: None) == f"{folder} has stopped: a full disk"


def test_on_a_terminal_layers_have_a_bar_each(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=40, layers=3)
    screen = io.StringIO()
    follow(str(folder), 1.0, console=Console(file=screen, force_terminal=True, width=100), sleep=lambda _: None)
    shown = screen.getvalue()
    for text in ("loss", "held out, step 40", "tokens/s", "fullest expert", "█", "skipped at step 21"):
        assert text in shown
    last = shown.rpartition("fullest expert, 1 is even")[2]
    assert len(re.findall(r"\d\.\dx", last)) == 3


def test_interrupting_the_view_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", finished=False, events=False)

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    assert follow(str(folder), 1.0, sleep=interrupt) == ""
    assert "the run goes on" in capsys.readouterr().out


def test_live_takes_one_run_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    for rest, said in (([str(folder)], "follows one run"), (["--output_dir", str(tmp_path / "o")], "writes nothing")):
        with pytest.raises(SystemExit) as ended:
            cli.main(["report", str(folder), *rest, "--live"])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
    with pytest.raises(ConfigError, match="there is no folder"):
        follow(str(tmp_path / "nowhere"), 1.0)
    with pytest.raises(ConfigError, match="is no run, but holds 1; give them"):
        follow(str(tmp_path), 1.0)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", "[1]"),
        ("run.json", '{"settings": 3, "source": {"commit": 5}, "command": "a b"}'),
        ("finished.json", '{"step": null, "stopped_early": false, "scores": {}}'),
        ("metrics.jsonl", '{"loss": 1.0}\n{"step": 99999999999999999999, "loss": 1.0}\n{"step": 1, "loss": 1.0}\n'),
    ],
)
def test_files_of_another_form_end_neither_page_nor_view(name: str, content: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "events.jsonl").write_text('{"event": "stopped", "step": 1, "time": "", "text": "at last"}\n')
    (folder / name).write_text(content)
    assert "<html" in page_of(folder)
    assert follow(str(folder), 1.0).startswith(str(folder))


def test_pictures_of_runs_with_names_alike_do_not_overwrite_each_other(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a:b"), write_run(tmp_path / "a-b")]
    cli.main(["report", *map(str, runs), "--output_dir", str(tmp_path / "out")])
    assert len(list((tmp_path / "out").glob("experts-a-b-*.png"))) == 2


def test_sparks() -> None:
    assert spark([3.0, 2.0, 1.0]) == "█▅▁"
    assert len(spark([1.0] * 1000)) <= 40
    assert spark([]) == ""


def test_a_page_can_be_made_while_the_run_writes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=200, finished=False)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("")
    done = threading.Event()

    def go_on() -> None:
        for line in lines:
            append(folder, line[: len(line) // 2])
            append(folder, line[len(line) // 2 :])
        done.set()

    writer = threading.Thread(target=go_on)
    writer.start()
    seen: list[RunData] = []
    while not done.is_set():
        seen.append(read_run(folder, "run"))
    writer.join()
    assert all("damaged" not in note for run in seen for note in run.notes)
    assert read_run(folder, "run").records == len(lines)
