"""From a command line and a YAML file to one validated, frozen configuration.

``argparse`` reads the command line and prints the help; pydantic checks types and ranges of everything at once,
because a parser that stops at the first mistake makes a user fix ten mistakes in ten runs. Later wins:

    defaults of the dataclass  <  the recipe's scale  <  ``--config`` YAML  <  command line
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from moe_scale.config import SCALES, RunConfig, Scale
from moe_scale.errors import ConfigError, Problem

C = TypeVar("C", bound=RunConfig)
Nested = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings(Generic[C]):
    """What the user asked for: the configuration as far as it could be read, and all that was wrong."""

    config: C
    problems: list[Problem]
    print_only: bool = False
    """``--print_config`` was given: show the configuration and stop."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One setting: its dotted path, annotation, default and help sentence."""

    path: str
    annotation: Any
    default: Any
    help: str


def leaves(config_class: type, prefix: str = "") -> Iterator[Leaf]:
    """All settings of a configuration class, depth first, plain fields before nested ones."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    fields = sorted(dataclasses.fields(config_class), key=lambda f: dataclasses.is_dataclass(hints[f.name]))
    for field in fields:
        if dataclasses.is_dataclass(hints[field.name]):
            yield from leaves(typing.cast(type, hints[field.name]), f"{prefix}{field.name}.")
        else:
            yield Leaf(f"{prefix}{field.name}", hints[field.name], field.default, field.metadata["help"])


def read_settings(
    config_class: type[C], scales: Mapping[Scale, Nested], argv: Sequence[str], *, machine_scale: Scale, recipe: str
) -> Settings[C]:
    """Read the command line (and the YAML file that it names) into ``config_class``.

    Args:
        config_class: the recipe's configuration dataclass.
        scales: for each scale that the recipe has, what differs from the dataclass defaults.
        argv: the command line without the program's name.
        machine_scale: the scale to take when none is asked for.
        recipe: the recipe's name, for the help text and ``output_dir``.

    Never raises for bad input: what is wrong is in ``Settings.problems``. Raises ``SystemExit(0)`` for ``--help``.
    """
    problems: list[Problem] = []
    given, from_file, extras = _read_sources(config_class, scales, argv, machine_scale, recipe, problems)

    scale = given.get("scale", from_file.get("scale", machine_scale))
    if scale not in scales:
        problems.append(Problem("scale", f"{scale!r}", f"choose one of {', '.join(scales)}"))
        scale = machine_scale
    base = {"scale": scale, "output_dir": f"runs/{recipe}"}
    nested = _merge(base, scales.get(typing.cast(Scale, scale), {}), from_file, _nest(given), {"scale": scale})

    config, type_problems = _validate(config_class, nested)
    return Settings(config, problems + type_problems + config.problems(), extras["print_config"])


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML that ``--config`` reads back to the same configuration."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, width=120)


def to_dict(config: Any) -> Nested:
    """The configuration as nested plain values."""
    plain = dataclasses.asdict(config)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}


# ---------------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Collects a usage error as a :class:`Problem` instead of printing it and leaving."""

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(Problem("command line", message, "see --help"))


def _read_sources(
    config_class: type,
    scales: Mapping[Scale, Nested],
    argv: Sequence[str],
    machine_scale: Scale,
    recipe: str,
    problems: list[Problem],
) -> tuple[dict[str, Any], Nested, dict[str, Any]]:
    """The settings given on the command line (dotted), those of the YAML file (nested), and the other options."""
    scout = _Parser(add_help=False, allow_abbrev=False)
    scout.add_argument("--scale", choices=SCALES, default=machine_scale)
    try:
        help_scale = scout.parse_known_args(argv)[0].scale
    except ConfigError:
        help_scale = machine_scale  # reported below, with everything else
    parser = _build_parser(config_class, scales.get(help_scale, {}), help_scale, recipe)
    try:
        known, unknown = parser.parse_known_args(argv)
    except ConfigError as error:
        problems += error.problems
        return {}, {}, {"print_config": False}
    given = vars(known)
    extras = {name: given.pop(name) for name in ("config", "print_config", "local_rank")}

    paths = [leaf.path for leaf in leaves(config_class)]
    for word in unknown:
        if word.startswith("--"):
            problems.append(_unknown(word.split("=")[0].lstrip("-"), paths, "on the command line", dashes="--"))
        elif not unknown[max(unknown.index(word) - 1, 0)].startswith("--"):
            problems.append(Problem("command line", f"unexpected word {word!r}", "every setting is --name value"))
    from_file = _read_yaml(extras["config"], problems) if extras["config"] else {}
    return given, from_file, extras


def _build_parser(config_class: type, scale_values: Nested, scale: Scale, recipe: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"recipes/{recipe}.py",
        allow_abbrev=False,
        description=f"Settings of {recipe}, with their defaults at --scale {scale}.",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=120),
        epilog="A YAML file given by --config holds the same settings, nested; the command line wins over it.",
    )
    parser.add_argument("--config", metavar="FILE", default=None, help="YAML file of settings")
    parser.add_argument("--print_config", action="store_true", help="print the resolved settings as YAML and stop")
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # given by DeepSpeed's launcher
    groups: dict[str, Any] = {}
    for leaf in leaves(config_class):
        section = leaf.path.rpartition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(section or "run")
        default = _lookup(scale_values, leaf.path, f"runs/{recipe}" if leaf.path == "output_dir" else leaf.default)
        if leaf.path == "scale":
            default = f"{scale} here"
        is_list = typing.get_origin(leaf.annotation) is tuple
        groups[section].add_argument(
            f"--{leaf.path}",
            default=argparse.SUPPRESS,
            nargs="*" if is_list else None,
            metavar=_metavar(leaf.annotation),
            help=f"{leaf.help} [{_show(default)}]".replace("%", "%%"),
        )
    return parser


def _metavar(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is Literal:
        return "{" + ",".join(map(str, typing.get_args(annotation))) + "}"
    if typing.get_origin(annotation) is tuple:
        return "TEXT"
    if isinstance(annotation, types.UnionType):
        annotation = typing.get_args(annotation)[0]
    return {int: "INT", float: "FLOAT", bool: "{true,false}", str: "TEXT"}.get(annotation, "VALUE")


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value)) or "none"
    return repr(value) if isinstance(value, str) and (value == "" or "\n" in value) else str(value)


def _read_yaml(name: str, problems: list[Problem]) -> Nested:
    path = Path(name).expanduser()
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(Problem("config", f"cannot read {name}: {error.strerror}", this_host_only=True))
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        problems.append(Problem("config", f"{name} is not valid YAML{line}: {getattr(error, 'problem', error)}"))
        return {}
    if not isinstance(loaded, dict | None):
        problems.append(
            Problem("config", f"{name} holds a {type(loaded).__name__}", "it must hold settings: 'name: value'")
        )
        return {}
    return loaded or {}


def _validate(config_class: type[C], nested: Nested) -> tuple[C, list[Problem]]:
    """Build the configuration; values that do not fit are reported and replaced by their defaults."""
    adapter = TypeAdapter(config_class)
    paths = [leaf.path for leaf in leaves(config_class)]
    try:
        return adapter.validate_python(nested), []
    except ValidationError as error:
        problems = []
        for item in error.errors():
            loc = tuple(str(part) for part in item["loc"])
            if item["type"] == "unexpected_keyword_argument":
                problems.append(_unknown(".".join(loc), paths, "in the settings"))
            else:
                allowed = item["msg"].removeprefix("Input ").split(", unable to parse")[0]
                problems.append(Problem(".".join(loc), f"{item['input']!r}", allowed))
            _remove(nested, loc)
        return _validate(config_class, nested)[0], problems


def _unknown(path: str, known: list[str], source: str, dashes: str = "") -> Problem:
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
    by_leaf = [p for p in known if p.rpartition(".")[2] == path.rpartition(".")[2]]
    hint = next(iter(by_leaf + close), None)
    return Problem(
        dashes + path, f"no such setting {source}", f"did you mean {dashes}{hint}?" if hint else "see --help"
    )


def _nest(dotted: Mapping[str, Any]) -> Nested:
    nested: Nested = {}
    for path, value in dotted.items():
        *sections, name = path.split(".")
        node = nested
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return nested


def _merge(*layers: Mapping[str, Any]) -> Nested:
    merged: Nested = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
            merged[key] = (
                _merge(merged[key], value) if both else (_merge(value) if isinstance(value, Mapping) else value)
            )
    return merged


def _lookup(nested: Nested, path: str, default: Any) -> Any:
    node: Any = nested
    for part in path.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return default
        node = node[part]
    return node


def _remove(nested: Nested, loc: tuple[str, ...]) -> None:
    """Take the value at ``loc`` out; where the path leads into a list or a scalar, take out what holds it."""
    node: Any = nested
    for part in loc[:-1]:
        if not isinstance(node.get(part), dict):
            node.pop(part, None)
            return
        node = node[part]
    node.pop(loc[-1], None)
