"""Settings from a command line and a YAML file: who wins, what is refused, and that nothing makes it raise."""

from __future__ import annotations

import dataclasses
import random
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_scale.config import SCALES, ClassifierConfig, LMConfig, MultimodalConfig, Scale
from moe_scale.settings import Settings, leaves, read_settings, to_dict, to_yaml

DEFAULTS: dict[Scale, dict[str, Any]] = {
    "cpu": {
        "deepspeed_config": "cpu.json", "max_steps": 500, "model": {"num_layers": 4, "d_model": 256, "num_heads": 8},
        "moe": {"num_experts": 16}, "optim": {"warmup_steps": 50},
    },
    "1gpu": {"deepspeed_config": "1gpu.json"},
    "1node": {"deepspeed_config": "1node.json", "moe": {"ep_size": 8}},
    "multinode": {"deepspeed_config": "multinode.json", "moe": {"ep_size": 8}, "resume": "auto"},
}  # fmt: skip
LEAVES = list(leaves(LMConfig))
NAMES = [leaf.path for leaf in LEAVES]


def read(*argv: str, yaml_text: str | bytes | None = None, folder: Path | None = None) -> Settings[LMConfig]:
    words = list(argv)
    if yaml_text is not None:
        assert folder is not None
        file = folder / "settings.yaml"
        file.write_bytes(yaml_text if isinstance(yaml_text, bytes) else yaml_text.encode())
        words = ["--config", str(file), *words]
    return read_settings(LMConfig, DEFAULTS, words, machine_scale="cpu", recipe="tiny")


def problems(*argv: str, yaml_text: str | bytes | None = None, folder: Path | None = None) -> list[str]:
    return [str(problem) for problem in read(*argv, yaml_text=yaml_text, folder=folder).problems]


def value_of(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


# --- who wins --------------------------------------------------------------------------------------------------------


def test_scale_wins_over_the_dataclass() -> None:
    config = read().config
    assert config.scale == "cpu"
    assert config.model.num_layers == DEFAULTS["cpu"]["model"]["num_layers"] != LMConfig().model.num_layers
    assert config.model.norm_eps == LMConfig().model.norm_eps
    assert config.output_dir == "runs/tiny"


def test_yaml_wins_over_the_scale(tmp_path: Path) -> None:
    config = read(yaml_text="model: {num_layers: 3}\nmax_steps: 900", folder=tmp_path).config
    assert (config.model.num_layers, config.max_steps) == (3, 900)
    assert config.model.d_model == DEFAULTS["cpu"]["model"]["d_model"], "the rest of the section stays"


def test_command_line_wins_over_yaml(tmp_path: Path) -> None:
    text = "model: {num_layers: 3, d_model: 64}\ndeepspeed_override: [a=1, b=2]"
    config = read("--model.num_layers", "5", "--deepspeed_override", "c=3", yaml_text=text, folder=tmp_path).config
    assert (config.model.num_layers, config.model.d_model) == (5, 64)
    assert config.deepspeed_override == ("c=3",), "a list is replaced as a whole"


@pytest.mark.parametrize("scale", SCALES)
def test_scale_from_yaml_and_command_line(scale: Scale, tmp_path: Path) -> None:
    by_flag, by_yaml = read("--scale", scale), read(yaml_text=f"scale: {scale}", folder=tmp_path)
    assert by_flag.problems == by_yaml.problems == []
    assert by_flag.config == by_yaml.config
    assert by_flag.config.deepspeed_config == DEFAULTS[scale]["deepspeed_config"]
    assert read(f"--scale={scale}", yaml_text="scale: 1gpu", folder=tmp_path).config == by_flag.config


def test_a_list_without_values_empties_what_was_given_before(tmp_path: Path) -> None:
    name = "--deepspeed_override"
    text = "deepspeed_override: [a=1]"
    assert read(name, "b=2", name, yaml_text=text, folder=tmp_path).config.deepspeed_override == ()
    assert read(name, "b=2", name, name, "c=3", yaml_text=text, folder=tmp_path).config.deepspeed_override == ("c=3",)


def test_the_last_of_a_repeated_flag_counts_and_lists_add_up() -> None:
    result = read(
        "--max_steps", "300", "--deepspeed_override", "a=1", "b=2", "--max_steps=400", "--deepspeed_override", "c=3"
    )
    assert result.problems == []
    assert result.config.max_steps == 400
    assert result.config.deepspeed_override == ("a=1", "b=2", "c=3")


def test_output_dir_names_the_recipe() -> None:
    assert read("--output_dir", "/data/{recipe}/1").config.output_dir == "/data/tiny/1"
    assert read("--output_dir", "/data/{other}").config.output_dir == "/data/{other}"


# --- every setting, everywhere ---------------------------------------------------------------------------------------


def help_text(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as end:
        read(*argv)
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("scale", SCALES)
def test_help_lists_every_setting_with_its_default(scale: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = " ".join(help_text(capsys, "--scale", scale, "--help").split())
    config = read("--scale", scale).config
    assert f"with their defaults at --scale {scale}" in words
    for leaf in LEAVES:
        value = value_of(config, leaf.path)
        assert f"--{leaf.path} " in words
        assert " ".join(leaf.help.split()) in words
        if leaf.path != "scale" and not isinstance(value, str | tuple):
            shown = str(value).lower() if isinstance(value, bool) else str(value)
            after = words.split(f" --{leaf.path} ", 1)[1]
            assert after.split("[", 1)[1].startswith(f"{shown}]"), leaf.path
        elif isinstance(value, str) and value.strip() == value and leaf.path != "scale":
            assert f"[{value or repr(value)}]" in words


def test_help_comes_before_complaints(capsys: pytest.CaptureFixture[str]) -> None:
    assert "usage" in help_text(capsys, "--foo", "--max_steps", "abc", "-h")
    assert "--scale cpu" in help_text(capsys, "--scale", "huge", "--help")


def test_every_setting_has_help_and_is_taken_from_the_command_line() -> None:
    other = {bool: "true", int: "2", float: "0.5"}
    texts = {"max_time": "1:30:00"}
    for leaf in LEAVES:
        assert leaf.help
        before = value_of(read().config, leaf.path)
        if isinstance(before, tuple):
            given, expected = "a=1", ("a=1",)
        elif type(before) in other:
            given = {"True": "false"}.get(str(before), other[type(before)])
            expected = type(before)({"false": 0, "true": 1}.get(given, given))
        else:
            choices = (
                typing.get_args(leaf.annotation)
                if typing.get_origin(leaf.annotation) is Literal
                else (texts.get(leaf.path, "other"),)
            )
            given = next(choice for choice in choices if choice != before)
            expected = given
        result = read(f"--{leaf.path}", given)
        assert value_of(result.config, leaf.path) == expected, leaf.path
        assert not [p for p in result.problems if p.where == leaf.path and "should" in str(p)], leaf.path
        assert value_of(read(f"--{leaf.path}={given}").config, leaf.path) == expected, leaf.path


@pytest.mark.parametrize("scale", SCALES)
def test_yaml_round_trip(scale: str, tmp_path: Path) -> None:
    result = read(
        "--scale", scale, "--eval.prompt", "yes: 'no'\n\t# \u00e9", "--optim.eps", "1e-12", "--data.text_field", "null",
        "--deepspeed_override", "zero_optimization.stage=2", "x=[1, 2]", "--telemetry.wandb", "off",
        "--moe.enabled", "no",
    )  # fmt: skip
    assert result.problems == []
    again = read(yaml_text=to_yaml(result.config), folder=tmp_path)
    assert again.problems == []
    assert again.config == result.config
    assert yaml.safe_load(to_yaml(result.config)) == to_dict(result.config)


def test_print_config_is_passed_on() -> None:
    assert read("--print_config").print_only
    assert not read().print_only


# --- types -----------------------------------------------------------------------------------------------------------

GOOD = {
    "moe.enabled": [("yes", True), ("TRUE", True), ("1", True), ("off", False), ("no", False), ("0", False)],
    "optim.lr": [("1e-3", 1e-3), ("1E-3", 1e-3), (".5", 0.5), ("1", 1.0), ("1_0.5", 10.5)],
    "max_steps": [("1000", 1000), (" 1000 ", 1000), ("1_000", 1000), ("1000.0", 1000), ("+1000", 1000), ("0100", 100)],
    "eval.prompt": [("-hello", "-hello"), ("- hello", "- hello"), ("5", "5"), ("no", "no"), ("ünï", "ünï")],
    "telemetry.wandb": [("off", "off")],
}  # fmt: skip


@pytest.mark.parametrize(("path", "given", "expected"), [(p, g, e) for p, cases in GOOD.items() for g, e in cases])
def test_good_values(path: str, given: str, expected: Any, tmp_path: Path) -> None:
    section, _, name = path.rpartition(".")
    quoted = f'"{given}"' if path == "eval.prompt" else given
    text = f"{section}:\n  {name}: {quoted}" if section else f"{name}: {quoted}"
    for result in (read(f"--{path}", given), read(f"--{path}={given}"), read(yaml_text=text, folder=tmp_path)):
        assert result.problems == []
        assert value_of(result.config, path) == expected
        assert type(value_of(result.config, path)) is type(expected)


BAD = {
    "moe.enabled": ["maybe", "2", "truee", ".nan"],
    "optim.lr": ["nan", "inf", "-inf", "-1", "-1e-3", "0", "1,5", "true", "0x10", "1e999"],
    "optim.beta1": ["1", "-0.1", "nan"],
    "max_steps": ["0", "-3", "1.5", "1e3", "true", "ten", "\u0663", "9" * 5000],
    "seed": ["-1"],
    "moe.backend": ["Custom", "tutel"],
    "resume": ["true", "yes"],
}


@pytest.mark.parametrize(("path", "given"), [(path, value) for path, values in BAD.items() for value in values])
def test_bad_values(path: str, given: str, tmp_path: Path) -> None:
    section, _, name = path.rpartition(".")
    text = f"{section}:\n  {name}: {given}" if section else f"{name}: {given}"
    for found in (
        problems(f"--{path}", given),
        problems(f"--{path}={given}"),
        problems(yaml_text=text, folder=tmp_path),
    ):
        assert len(found) == 1, found
        assert found[0].startswith(f"{path}: '{given[:40]}")
        assert "; should be" in found[0] or "; should not" in found[0]
        assert len(found[0]) < 300, "long values are shortened"


@pytest.mark.parametrize("path", ["max_steps", "optim.lr", "moe.enabled", "telemetry.wandb", "resume", "scale"])
def test_empty_and_null_values(path: str, tmp_path: Path) -> None:
    section, _, name = path.rpartition(".")
    for found in (problems(f"--{path}", ""), problems(f"--{path}=")):
        assert len(found) == 1
        assert found[0].startswith(f"{path}: ''; ")
    for null in ("", "null", "~"):
        text = f"{section}:\n  {name}: {null}" if section else f"{name}: {null}"
        (found_in_yaml,) = problems(yaml_text=text, folder=tmp_path)
        assert found_in_yaml.startswith(f"{path}: None; ")


def test_null_is_no_text(tmp_path: Path) -> None:
    assert problems(yaml_text="eval: {prompt: null}", folder=tmp_path) == ["eval.prompt: None; should be text"]
    assert read(yaml_text="eval: {prompt: 'null'}", folder=tmp_path).config.eval.prompt == "null"
    assert read("--eval.prompt", "").config.eval.prompt == ""


@pytest.mark.parametrize("values", [[], ["0.5"], ["0.5"] * 2, ["0.5"] * 4])
def test_lists_of_a_fixed_length(values: list[str]) -> None:
    settings = read_settings(MultimodalConfig, {"cpu": {}}, ["--data.mean", *values], machine_scale="cpu", recipe="r")
    assert [str(problem) for problem in settings.problems] == [f"data.mean: {values}; give 3 values"]


def test_lists(tmp_path: Path) -> None:
    assert read("--deepspeed_override").config.deepspeed_override == ()
    assert read(yaml_text="deepspeed_override: []", folder=tmp_path).config.deepspeed_override == ()
    assert read(yaml_text="deepspeed_override: [a=1, b]", folder=tmp_path).config.deepspeed_override == ("a=1", "b")
    (found,) = problems(yaml_text="deepspeed_override: a=1", folder=tmp_path)
    assert found == "deepspeed_override: 'a=1'; should be a list"
    found_items = problems(yaml_text="deepspeed_override: [[a], {b: 1}, c=1]", folder=tmp_path)
    assert found_items == [
        "deepspeed_override: ['a']; should be text",
        "deepspeed_override: {'b': '1'}; should be text",
    ]


# --- all at once -----------------------------------------------------------------------------------------------------


def test_all_problems_at_once(tmp_path: Path) -> None:
    text = "moe: {topk: 2, ep_size: -1}\nmodel: 7\nmax_steps: abc"
    argv = ["--optim.lr", "fast", "--foo", "1", "--moe.top_k", "99", "--data.seq_len", "--seed", "x", "stray"]
    found = problems(*argv, yaml_text=text, folder=tmp_path)
    where = {line.split(":")[0] for line in found}
    assert where == {
        "moe.topk", "moe.ep_size", "model", "max_steps", "optim.lr", "--foo", "moe.top_k", "--data.seq_len", "seed",
        "command line",
    }  # fmt: skip
    assert len(found) == len(set(found)) == 10


def test_values_that_nobody_gave_are_not_complained_about() -> None:
    assert len(problems("--optim.warmup_steps", "abc", "--max_steps", "50")) == 1
    assert len(problems("--model.num_heads", "abc", "--model.d_model", "100")) == 1
    assert len(problems("--model.d_model", "abc", "--model.num_heads", "12", "--model.num_kv_heads", "12")) == 1
    assert read("--model.d_model", "abc").config.model.d_model == DEFAULTS["cpu"]["model"]["d_model"]


# --- unknown names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [("moe.topk", "moe.top_k"), ("top_k", "moe.top_k"), ("max-steps", "max_steps"), ("max_step", "max_steps"),
     ("optim.seq_len", "data.seq_len"), ("model.d_modell", "model.d_model")],
)  # fmt: skip
def test_unknown_flags_with_suggestions(name: str, hint: str) -> None:
    for argv in ([f"--{name}", "3"], [f"--{name}=3"], [f"--{name}"]):
        assert problems(*argv) == [f"--{name}: no such setting on the command line; did you mean --{hint}?"]


def test_unknown_flags_without_suggestions() -> None:
    assert problems("--zzz", "3") == ["--zzz: no such setting on the command line; see --help"]
    assert problems("-max_steps", "3") == ["-max_steps: no such setting on the command line; did you mean --max_steps?"]


def test_flags_are_not_abbreviated() -> None:
    assert problems("--max_step", "3")[0].startswith("--max_step: no such setting")


@pytest.mark.parametrize(
    ("text", "where", "hint"),
    [
        ("moe: {topk: 2}", "moe.topk", "did you mean moe.top_k?"),
        ("top_k: 2", "top_k", "did you mean moe.top_k?"),
        ("data: {source: {path: x}}", "data.source", "write data.source: value"),
        ("model: {attention: {gate: x}}", "model.attention", "did you mean model.attention_gate?"),
        ("moe.top_k: 2", "moe.top_k", "write it nested: moe: {top_k: ...}"),
        ("1: 2", "1", "see --help"),
        ("true: 2", "true", "see --help"),
        ("null: 2", "None", "see --help"),
        ("moe: {1: 2}", "moe.1", ""),
        ("2020-01-01: 2", "2020-01-01", "see --help"),
        ("'': 2", "''", "see --help"),
    ],
)
def test_unknown_names_in_yaml(text: str, where: str, hint: str, tmp_path: Path) -> None:
    (found,) = problems(yaml_text=text, folder=tmp_path)
    assert found.startswith(f"{where}: ")
    assert hint in found


# --- YAML that is no settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "# nothing", "---", "{}", "moe:", "moe: {}", "moe:\n  # top_k: 3\nmax_steps: 500"]
)
def test_empty_yaml_changes_nothing(text: str, tmp_path: Path) -> None:
    result = read(yaml_text=text, folder=tmp_path)
    assert result.problems == []
    assert result.config == read().config


@pytest.mark.parametrize("value", ["3", "text", "[top_k, 2]", "[]", "''"])
def test_value_where_a_section_belongs(value: str, tmp_path: Path) -> None:
    for argv in ([], ["--moe.top_k", "2"]):
        (found,) = problems(*argv, yaml_text=f"moe: {value}", folder=tmp_path)
        assert found.startswith("moe: ")
        assert "it is a section" in found


def test_section_where_a_value_belongs(tmp_path: Path) -> None:
    for argv in ([], ["--max_steps", "300"]):
        (found,) = problems(*argv, yaml_text="max_steps: {of: 3}", folder=tmp_path)
        assert found == "max_steps: {'of': '3'}, but it is no section; write max_steps: value"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("- a\n- b", "holds a list"),
        ("just text", "holds a single value"),
        ("a: [1", "not valid YAML at line 1"),
        ("max_steps: 3\nmoe: {a", "not valid YAML at line 2"),
        ("\tmoe: 3", "not valid YAML at line 1"),
        ("a: 1\n---\nb: 2", "not valid YAML at line 2"),
        ("moe: {top_k: 2}\nmoe: {top_k: 3}", "not valid YAML at line 2: 'moe' is given twice"),
        ("? [a]\n: b", "not valid YAML"),
        ("moe: &x\n  top_k: *x", "not valid YAML"),
        ("[" * 3000, "nested too deeply"),
        (b"\xff\xfe\x00", "byte 0 is not UTF-8"),
        (b"\x00\x01", "not valid YAML"),
        (bytes(range(256)), "is not UTF-8"),
    ],
)
def test_invalid_yaml(text: str | bytes, what: str, tmp_path: Path) -> None:
    (found,) = problems(yaml_text=text, folder=tmp_path)
    assert found.startswith(f"config: {tmp_path}/settings.yaml ")
    assert what in found
    assert "\n" not in found


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    read(yaml_text=f"data: {{source: !!python/object/apply:os.mkdir ['{tmp_path}/made']}}", folder=tmp_path)
    assert not (tmp_path / "made").exists()


def test_yaml_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert read(yaml_text=b"\xef\xbb\xbfmax_steps: 700", folder=tmp_path).config.max_steps == 700


def test_yaml_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert problems("--config", str(tmp_path)) == [f"config: cannot read {tmp_path}: Is a directory"]
    assert problems("--config", f"{tmp_path}/no") == [f"config: cannot read {tmp_path}/no: No such file or directory"]
    for name in ("", "~nobody-has-this-name/x.yaml", "x" * 300, "a\0b"):
        (found,) = problems("--config", name)
        assert found.startswith("config: cannot read ")
    assert read("--config", "/dev/null").problems == []


def test_config_path_may_be_relative_with_spaces_or_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my settings.yaml").write_text("max_steps: 700")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("my settings.yaml", "./my settings.yaml", "~/my settings.yaml"):
        assert read("--config", name).config.max_steps == 700
        assert read(f"--config={name}").config.max_steps == 700


# --- words on the command line ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv", [["stray"], ["--max_steps", "300", "stray"], ["--print_config", "stray"], ["--foo=1", "stray"]]
)
def test_stray_words(argv: list[str]) -> None:
    assert "command line: unexpected word 'stray'; every setting is --name value" in problems(*argv)


def test_value_of_an_unknown_flag_is_not_reported_twice() -> None:
    assert len(problems("--foo", "1")) == 1
    assert len(problems("--foo", "a", "b", "a")) == 3


@pytest.mark.parametrize("path", ["max_steps", "moe.enabled", "eval.prompt", "scale", "config"])
def test_flag_without_a_value(path: str) -> None:
    for argv in ([f"--{path}"], [f"--{path}", "--seed", "3"]):
        (found,) = problems(*argv)
        assert found.startswith(f"--{path}: given without a ")
    assert len(problems(f"--{path}", "--seed", "x")) == 2


def test_launcher_argument_is_ignored() -> None:
    for argv in (["--local_rank=3"], ["--local_rank", "3"]):
        result = read(*argv)
        assert result.problems == []
        assert result.config == read().config


# --- whatever is given, it never raises ------------------------------------------------------------------------------

ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
VALUES = st.one_of(
    st.sampled_from(
        ["1", "-1", "0", "2.5", "nan", "true", "", "-h1", "{}", "[]", "=", "a=b", "%s", "%(prog)s", "~", "--", "-"]
    ),
    st.integers(-(10**6), 10**6).map(str),
    ANY_TEXT,
)
WORDS = st.one_of(
    st.sampled_from([f"--{name}" for name in NAMES] + ["--config", "--print_config", "--local_rank", "--unknown"]),
    st.tuples(st.sampled_from(NAMES), VALUES).map(lambda pair: f"--{pair[0]}={pair[1]}"),
    VALUES,
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**6), 10**6), st.floats(), ANY_TEXT, st.dates(), st.binary(max_size=4)
)
KEYS = st.one_of(
    st.sampled_from([part for name in NAMES for part in (name, *name.split("."))]), ANY_TEXT, st.integers(), st.none()
)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
# The health check is of the fixture: the folder is the same for all examples, and each writes its file anew.
FUZZ = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_sound(result: Settings[LMConfig]) -> None:
    assert isinstance(result.config, LMConfig)
    assert read_settings_again(result.config) == result.config
    for problem in result.problems:
        assert problem.where
        assert problem.what
        assert len(str(problem)) < 1000


def read_settings_again(config: LMConfig) -> LMConfig:
    argv = []
    for leaf in LEAVES:
        value = value_of(config, leaf.path)
        argv += [f"--{leaf.path}", *value] if isinstance(value, tuple) else [f"--{leaf.path}={value}"]
    return read(*argv).config if not any(word.startswith("-") for word in config.deepspeed_override) else config


@FUZZ
@given(st.lists(WORDS, max_size=10))
def test_any_command_line(argv: list[str]) -> None:
    if not any(word.startswith("-h") or word == "--help" for word in argv):  # which print the help and leave
        assert_sound(read(*argv))


@FUZZ
@given(tree=st.dictionaries(KEYS, TREES, max_size=6) | TREES)
def test_any_yaml_tree(tree: Any, tmp_path: Path) -> None:
    assert_sound(read(yaml_text=yaml.safe_dump(tree), folder=tmp_path))


@FUZZ
@given(content=st.binary(max_size=40) | st.text("{}[]:,-&*!|>%@`\"'#? \n\tab1~=<.", max_size=40).map(str.encode))
def test_any_yaml_bytes(content: bytes, tmp_path: Path) -> None:
    assert_sound(read(yaml_text=content, folder=tmp_path))


def test_order_of_flags_does_not_matter() -> None:
    pairs = [
        ("--seed", "3"),
        ("--scale", "1gpu"),
        ("--moe.top_k", "3"),
        ("--deepspeed_override", "a=1"),
        ("--foo", "1"),
    ]
    expected = read(*[word for pair in pairs for word in pair])
    for seed in range(5):
        shuffled = random.Random(seed).sample(pairs, len(pairs))
        result = read(*[word for pair in shuffled for word in pair])
        assert (result.config, result.problems) == (expected.config, expected.problems)


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        read().config.max_steps = 3  # type: ignore[misc]


# --- settings that follow from others ------------------------------------------------------------------------------


def test_what_is_derived_is_no_setting(tmp_path: Path) -> None:
    """``classifier`` has four settings of the sparse layer in its model's section, and there alone."""
    derived = {"moe.num_experts", "moe.top_k", "moe.router_temperature", "moe.intermediate_size"}
    names = {leaf.path for leaf in leaves(ClassifierConfig)}
    assert not derived & names
    assert {"model.num_experts", "model.k", "model.temperature", "model.hidden_size", "moe.backend"} <= names
    how: dict[str, Any] = {"machine_scale": "cpu", "recipe": "tiny"}
    found = read_settings(ClassifierConfig, {"cpu": {}}, ["--model.num_experts", "6", "--model.k", "3"], **how)
    assert not found.problems
    config = found.config
    assert (config.moe.num_experts, config.moe.top_k) == (6, 3)
    assert not derived & {f"moe.{name}" for name in to_dict(config)["moe"]}
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    again = read_settings(ClassifierConfig, {"cpu": {}}, ["--config", str(tmp_path / "again.yaml")], **how)
    assert (again.config, again.problems) == (config, [])
    moved = dataclasses.replace(config, moe=dataclasses.replace(config.moe, ep_size=3))
    assert (moved.moe.ep_size, moved.moe.num_experts) == (3, 6)
    (tmp_path / "wrong.yaml").write_text("moe: {top_k: 3}")
    wrong = read_settings(ClassifierConfig, {"cpu": {}}, ["--config", str(tmp_path / "wrong.yaml")], **how)
    assert [p.where for p in wrong.problems] == ["moe.top_k"]
