"""From a command line and a YAML file to one validated, frozen configuration.

``argparse`` reads the command line and prints the help; pydantic checks types and ranges of everything at once,
because a parser that stops at the first mistake makes a user fix ten mistakes in ten runs. Later wins:

    defaults of the dataclass  <  the recipe's scale  <  ``--config`` YAML  <  command line
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import reprlib
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
    for field in (field for field in fields if field.init):  # the others are derived
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
    if not isinstance(scale, str) or scale not in scales:
        problems.append(Problem("scale", _quote(scale), f"choose one of {', '.join(scales)}"))
        scale = machine_scale
    base = _merge(scales.get(typing.cast(Scale, scale), {}), {"scale": scale})
    config, type_problems = _validate(config_class, base, _merge(base, from_file, _nest(given), {"scale": scale}))
    config = dataclasses.replace(config, output_dir=config.output_dir.replace("{recipe}", recipe))

    # A value that could not be read was replaced by its default: what that one contradicts is no news to the user.
    unread = {problem.where for problem in type_problems}
    conflicts = [p for p in config.problems() if not any(path in str(p) for path in unread)]
    return Settings(config, problems + type_problems + conflicts, extras["print_config"])


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML that ``--config`` reads back to the same configuration."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, width=120)


def to_dict(config: Any) -> Nested:
    """The settings of a configuration as nested plain values, as they come back from JSON or YAML."""
    return _plain(config, type(config))


def _plain(config: Any, declared: type) -> Nested:
    """The fields that can be set of ``config``, which stands where a ``declared`` is expected."""
    nested: Nested = {}
    hints = typing.get_type_hints(declared)
    for field in dataclasses.fields(declared):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            nested[field.name] = _plain(value, typing.cast(type, hints[field.name]))
        elif field.init:
            nested[field.name] = list(value) if isinstance(value, tuple) else value
    return nested


# ---------------------------------------------------------------------------------------------------------------------


_MISSING = "\0"
"""Stands for the value of a flag that was given without one; no command line can hold it."""


class _Parser(argparse.ArgumentParser):
    """Collects a usage error as a :class:`Problem` instead of printing it and leaving."""

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(Problem("command line", message, "see --help"))


class _Pieces(argparse.Action):
    """Adds up the values of a list's flag; the flag without any empties the list, whatever was given before it."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        before = getattr(namespace, self.dest, None) or []
        setattr(namespace, self.dest, [*before, *values] if values else [])


class _Loader(yaml.BaseLoader):
    """YAML in which every scalar but null is text, as on the command line, so that both are read by the same rules.

    YAML's own types would make ``wandb: off`` a boolean, ``1e-3`` text and ``010`` eight. A key given twice is an
    error: one of the two values would be lost.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{_quote(key.value)} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


_NULL = "tag:yaml.org,2002:null"
_Loader.add_implicit_resolver(_NULL, re.compile("(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_constructor(_NULL, lambda loader, node: None)


def _read_sources(
    config_class: type,
    scales: Mapping[Scale, Nested],
    argv: Sequence[str],
    machine_scale: Scale,
    recipe: str,
    problems: list[Problem],
) -> tuple[dict[str, Any], Nested, dict[str, Any]]:
    """The settings given on the command line (dotted), those of the YAML file (nested), and the other options."""
    every = list(leaves(config_class))
    argv = _join_values(argv, {"--config", *(f"--{leaf.path}" for leaf in every if not _is_list(leaf))})
    help_scale = next((word.partition("=")[2] for word in reversed(argv) if word.startswith("--scale=")), "")
    shown = next((scale for scale in SCALES if scale == help_scale), machine_scale)
    parser = _build_parser(config_class, scales.get(shown, {}), shown, recipe)
    try:
        known, unknown = parser.parse_known_args(argv)
    except ConfigError as error:
        problems += error.problems
        return {}, {}, {"print_config": False}
    given = vars(known)
    extras = {name: given.pop(name) for name in ("config", "print_config", "local_rank")}
    for path in [path for path, value in given.items() if value == _MISSING]:
        problems.append(Problem(f"--{path}", "given without a value", f"write --{path} VALUE or --{path}=VALUE"))
        del given[path]

    paths = [leaf.path for leaf in every]
    for before, word in zip(["", *unknown], unknown, strict=False):
        if word.startswith("-") and word.strip("-"):
            name = word.partition("=")[0]
            problems.append(_unknown(name, name.lstrip("-"), paths, "on the command line", dashes="--"))
        elif not before.startswith("-") or "=" in before:
            problems.append(Problem("command line", f"unexpected word {_quote(word)}", "every setting is --name value"))
    if extras["config"] == _MISSING:
        problems.append(Problem("--config", "given without a file", "write --config FILE"))
    elif extras["config"] is not None:
        return given, _known_settings(config_class, _read_yaml(extras["config"], problems), problems), extras
    return given, {}, extras


def _join_values(argv: Sequence[str], flags: set[str]) -> list[str]:
    """``--name value`` as ``--name=value``, so that argparse takes ``-1e-3`` and ``-hello`` for values too."""
    joined: list[str] = []
    for word in [*argv, "--"]:
        if not joined or joined[-1] not in flags:
            joined.append(word)
        elif word.startswith("--"):
            joined[-1] += f"={_MISSING}"
            joined.append(word)
        else:
            joined[-1] += f"={word}"
    return joined[:-1]


def _is_list(leaf: Leaf) -> bool:
    return typing.get_origin(leaf.annotation) is tuple


def _build_parser(config_class: type, scale_values: Nested, scale: Scale, recipe: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"recipes/{recipe}.py",
        usage="%(prog)s [--config FILE] [--name VALUE ...]",
        allow_abbrev=False,
        description=f"Settings of {recipe}, with their defaults at --scale {scale}.",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=120),
        epilog="A YAML file given by --config holds the same settings, nested; the command line wins over it.",
    )
    parser.add_argument("--config", metavar="FILE", default=None, help="YAML file of settings")
    parser.add_argument("--print_config", action="store_true", help="print the resolved settings as YAML and stop")
    parser.add_argument("--local_rank", nargs="?", help=argparse.SUPPRESS)  # given by DeepSpeed's launcher
    groups: dict[str, Any] = {}
    for leaf in leaves(config_class):
        section = leaf.path.rpartition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(section or "run")
        default = _lookup(scale_values, leaf.path, f"runs/{recipe}" if leaf.path == "output_dir" else leaf.default)
        if leaf.path == "scale":
            default = f"{scale} here"
        # A list may be given in several pieces; of a single value the last one counts.
        how: dict[str, Any] = {"nargs": "*", "action": _Pieces} if _is_list(leaf) else {}
        groups[section].add_argument(
            f"--{leaf.path}",
            default=argparse.SUPPRESS,
            **how,
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
        annotation = typing.get_args(annotation)[0]
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
    try:
        loaded = yaml.load(Path(name).expanduser().read_text(encoding="utf-8-sig"), _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        problems.append(Problem("config", f"{name} is not valid YAML{line}: {what}", this_host_only=True))
    except UnicodeDecodeError as error:
        problems.append(Problem("config", f"{name} is no text: byte {error.start} is not UTF-8", this_host_only=True))
    except RecursionError:
        problems.append(Problem("config", f"{name} is nested too deeply", this_host_only=True))
    except (OSError, ValueError, RuntimeError) as error:  # the last two: a NUL in the name, ~ of an unknown user
        why = getattr(error, "strerror", None) or error
        problems.append(Problem("config", f"cannot read {name or repr(name)}: {why}", this_host_only=True))
    else:
        if isinstance(loaded, dict) or loaded is None:
            return loaded or {}
        kind = "list" if isinstance(loaded, list) else "single value"
        problems.append(Problem("config", f"{name} holds a {kind}", "it must hold settings: 'name: value'"))
    return {}


def _known_settings(config_class: type, loaded: Nested, problems: list[Problem], section: str = "") -> Nested:
    """What ``loaded`` sets, without unknown names and without sections and values in each other's place."""
    paths = [leaf.path for leaf in leaves(config_class)]
    sections = {path.rpartition(".")[0] for path in paths}
    known: Nested = {}
    for key, value in loaded.items():
        name = str(key)
        path = section + name
        if path in sections and name and "." not in name:
            if isinstance(value, dict):
                known[name] = _known_settings(config_class, value, problems, f"{path}.")
            elif value is not None:  # a section whose lines are all commented out holds nothing
                example = next(p for p in paths if p.startswith(f"{path}.")).rpartition(".")[2]
                problems.append(
                    Problem(path, f"{_quote(value)}, but it is a section", f"write {path}: {{{example}: ...}}")
                )
        elif path in paths and "." not in name:
            if isinstance(value, dict):
                problems.append(Problem(path, f"{_quote(value)}, but it is no section", f"write {path}: value"))
            else:
                known[name] = value
        elif path in paths:
            nested = name.replace(".", ": {") + ": ..." + "}" * name.count(".")
            problems.append(Problem(path, "a dot in a YAML name", f"write it nested: {nested}"))
        else:
            problems.append(_unknown(path, path, paths, "in the YAML file"))
    return known


def _validate(config_class: type[C], defaults: Nested, nested: Nested) -> tuple[C, list[Problem]]:
    """Build the configuration; values that do not fit are reported and replaced by their defaults."""
    adapter = TypeAdapter(config_class)
    try:
        return adapter.validate_python(nested), []
    except ValidationError as error:
        problems = []
        annotations = {leaf.path: leaf.annotation for leaf in leaves(config_class)}
        for item in error.errors():
            loc = [str(part) for part in item["loc"]]
            places = (".".join(loc), ".".join(loc[:-1]))  # the second: of a list
            path = next((place for place in places if place in annotations), None)
            if path is None:
                raise  # not a user's value but a recipe's own: _known_settings lets no other name through
            allowed = (
                _number_of_values(annotations[path], item["type"])
                or _ALLOWED.get(item["type"])
                or item["msg"].removeprefix("Input ").removeprefix("Value error, ").split(", unable to")[0]
            )
            problems.append(Problem(path, _quote(item["input"]), allowed))
            _set(nested, path, _lookup(defaults, path, _REMOVE))
        return adapter.validate_python(nested), list(dict.fromkeys(problems))


def _number_of_values(annotation: Any, error: str) -> str | None:
    """What a list of a fixed length should have been, if its length is the error."""
    if typing.get_origin(annotation) is not tuple or Ellipsis in typing.get_args(annotation):
        return None
    return f"give {len(typing.get_args(annotation))} values" if error in ("missing", "too_long") else None


_REMOVE = object()
_ALLOWED = {
    "bool_parsing": "should be true or false",
    "bool_type": "should be true or false",
    "int_parsing_size": "should be a number of fewer digits",
    "string_type": "should be text",
    "tuple_type": "should be a list",
}
"""What pydantic says of these errors in words of its own."""


def _quote(value: Any) -> str:
    """The value as Python would write it, shortened in its middle where it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 100
    return short.repr(value)


def _unknown(where: str, path: str, known: list[str], source: str, dashes: str = "") -> Problem:
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
    by_leaf = [p for p in known if p.rpartition(".")[2] == path.rpartition(".")[2]]
    hint = next(iter(by_leaf + close), None)
    what = f"no such setting {source}"
    return Problem(where or "''", what, f"did you mean {dashes}{hint}?" if hint else "see --help")


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


def _set(nested: Nested, path: str, value: Any) -> None:
    """Put ``value`` at ``path``, or take out what is there if it is ``_REMOVE``."""
    *sections, name = path.split(".")
    node: Any = nested
    for section in sections:
        node = node[section]
    if value is _REMOVE:
        node.pop(name, None)
    else:
        node[name] = value
