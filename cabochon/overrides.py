"""From recipes and `a.b=c` to a config, and back to YAML. Later wins: defaults < file(s) < command line.

Every leaf remembers where it was written, so that an error names the file and line, or the command line. Values are
YAML 1.2 scalars, lists and mappings, taken literally: no interpolation, `1e-4` is a number, `no` and `2026-01-01` are
text. (YAML 1.1, which PyYAML reads by default, has it the other way round in all three.)
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from yaml.constructor import ConstructorError

from cabochon.errors import UserError

Config = TypeVar("Config", bound=BaseModel)
KeyPath = tuple[str | int, ...]

RECIPES = Path(__file__).resolve().parent / "recipes"
COMMAND_LINE = "command line"
_KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*")


class _Loader(yaml.SafeLoader):
    """Reads YAML 1.2 scalars. Whatever cannot be made of a node is a ConstructorError: `!!int a`, a key given twice."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """All of it at once, so that a node inside itself is met while it is being made."""
        if node in self.recursive_objects:
            raise ConstructorError(None, None, "an anchor that holds itself", node.start_mark)
        try:
            return super().construct_object(node, deep=True)
        except (LookupError, AttributeError, ArithmeticError, ValueError) as error:  # of SafeLoader's own constructors
            said = f"{_short(node.value)} is not of type {node.tag.rpartition(':')[2]}"
            raise ConstructorError(None, None, said, node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        list(_entries(node, ()))
        return super().construct_mapping(node, deep=True)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever text `_Loader` would take for something else."""

    def represent_text(self, text: str) -> yaml.Node:
        """Unicode line breaks survive in double quotes only, where they are escaped."""
        style = '"' if re.search("[\x85\u2028\u2029\ufeff]", text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)

for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in (
        ("null", r"~|null|", ["~", "n", ""]),
        ("bool", r"true|false", ["t", "f"]),
        ("int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
        ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


@dataclass
class Layers:
    """Settings merged so far, and where each was written: `origin[("optim", "b1")] == "tiny.yaml:7"`."""

    data: dict[str, Any] = field(default_factory=dict)
    origin: dict[KeyPath, str] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    """recipe files and the command line, in the order they were merged"""

    def put(self, path: KeyPath, value: Any, where: str) -> None:
        """Set one key; a mapping merges into what is there, anything else replaces it."""
        if isinstance(value, dict) and value:
            for key, item in value.items():
                self.put((*path, key), item, where)
            return
        node: dict[Any, Any] = self.data
        for key in path[:-1]:
            if not isinstance(node.get(key), dict):
                node[key] = {}
            node = node[key]
        if value == {} and isinstance(node.get(path[-1]), dict):
            return
        node[path[-1]] = value
        self.origin = {p: w for p, w in self.origin.items() if p[: len(path)] != path}
        self.origin[path] = where

    def where(self, path: KeyPath) -> str:
        """The place that set `path`, or else its nearest parent, or the child set last, or all that was read."""
        for n in range(len(path), 0, -1):
            if path[:n] in self.origin:
                return self.origin[path[:n]]
        for known in reversed(self.origin):
            if path and known[: len(path)] == path:
                return self.origin[known]
        return ", ".join(self.sources) or COMMAND_LINE


def recipe_names() -> list[str]:
    """Names of the recipes shipped with the package."""
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """The file of a recipe, given the name of a shipped one or a path."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or "/" in name:
        if path.is_file():
            return path
        raise UserError(f"{name}: no such recipe file; shipped recipes: {', '.join(recipe_names())}")
    shipped = RECIPES / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    if "." in name and _KEY.fullmatch(name):
        raise UserError(f"{COMMAND_LINE}: {name!r} is not a setting; expected key=value, such as {name}=...")
    raise UserError(
        f"{name}: no shipped recipe has that name{_nearest(name, recipe_names())}; shipped: {', '.join(recipe_names())}"
    )


def load(schema: type[Config], recipes: Sequence[str], settings: Sequence[str] = ()) -> Config:
    """The config made of recipes (names or paths) and `a.b=c` settings, the later winning.

    Raises UserError, one line, naming the key, where it was written, what was expected and the nearest existing key.
    """
    layers = _merged(recipes, settings, schema)
    try:
        config = schema.model_validate(layers.data)
    except ValidationError as error:
        _explain(schema, layers, error.errors(include_url=False))
    _refuse_bool_as_number(config, layers)
    return config


def peek(recipes: Sequence[str], settings: Sequence[str], key: str) -> Any:
    """What a top-level key is set to, None where it is not: to choose the schema to `load` with."""
    return _peeked(recipes, settings, key).data.get(key)


def origin(recipes: Sequence[str], settings: Sequence[str], key: str) -> str:
    """Where a top-level key is set, to say so of a value that `peek` gave."""
    return _peeked(recipes, settings, key).where((key,))


def split(parts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments of a command -> (recipes, settings): a setting is what has `=`, and no `/` before it."""
    settings = [part for part in parts if re.match(r"[^/=]+=", part)]
    return [part for part in parts if part not in settings], settings


def summary(name: str) -> str:
    """What a recipe is for: the comment on its first line."""
    with find_recipe(name).open(encoding="utf-8") as file:
        first = file.readline()
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def dump(config: BaseModel) -> str:
    """The whole config as YAML, defaults included, in a form `load` reads back to an equal config."""
    data = config.model_dump(mode="json")
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)


def parse_setting(text: str, schema: type[BaseModel] | None = None) -> tuple[KeyPath, Any]:
    """`optim.b1=0.9` -> (("optim", "b1"), 0.9). The value is YAML: `[a, b]`, `{k: v}`, `null`, `'quoted'`.

    Raises UserError, with the nearest key of `schema` where a key was meant.
    """
    key, equals, value = text.partition("=")
    if not equals or not _KEY.fullmatch(key):
        hint = "; expected key=value, such as optim.b1=0.9"
        meant = key.replace("-", "_")
        if equals and schema is not None and _KEY.fullmatch(meant):
            path = tuple(meant.split("."))
            hint = f"; did you mean {meant}?" if path in keys_of(schema) else _nearest_key(schema, path, None)
        raise UserError(f"{COMMAND_LINE}: {text!r} is not a setting{hint}")
    try:
        return tuple(key.split(".")), yaml.load(value, Loader=_Loader)
    except ConstructorError as error:
        raise UserError(f"{COMMAND_LINE}: {key}: {error.problem}") from error
    except (yaml.YAMLError, RecursionError) as error:
        said = f"{_short(value)} is not YAML ({_yaml_problem(error)}); quote it"
        raise UserError(f"{COMMAND_LINE}: {key}: {said}") from error


def _peeked(recipes: Sequence[str], settings: Sequence[str], key: str) -> Layers:
    """What `key` is made of; a wrong setting of another is for `load` to refuse, which knows the schema."""
    return _merged(recipes, [setting for setting in settings if setting.partition("=")[0] == key])


def _merged(recipes: Sequence[str], settings: Sequence[str], schema: type[BaseModel] | None = None) -> Layers:
    layers = Layers()
    for name in recipes:
        _read(find_recipe(name), layers)
    if settings:
        layers.sources.append(COMMAND_LINE)
    for setting in settings:
        path, value = parse_setting(setting, schema)
        layers.put(path, value, COMMAND_LINE)
    return layers


def _read(path: Path, layers: Layers) -> None:
    """Merge one file, key by key with its line."""
    layers.sources.append(str(path))
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not YAML: {_yaml_problem(error)}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if node is None:
        return
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: expected a mapping of keys at the top, got {_kind(node)}")
    try:
        for keys, value, line in _leaves(node, (), (node,)):
            layers.put(keys, value, f"{path}:{line}")
    except ConstructorError as error:
        where = f"{path}:{error.problem_mark.line + 1}" if error.problem_mark else path
        raise UserError(f"{where}: {error.problem}") from error


def _leaves(
    node: yaml.MappingNode, prefix: KeyPath, above: tuple[yaml.Node, ...]
) -> Iterator[tuple[KeyPath, Any, int]]:
    """(key path, value, line) of everything in a mapping that is not itself a mapping with keys.

    Raises ConstructorError at the line of the key. `above`: the nodes it is inside of, itself the last.
    """
    for key, value, mark in _entries(node, prefix):
        if isinstance(value, yaml.MappingNode) and value.value and value not in above:
            yield from _leaves(value, (*prefix, key), (*above, value))
            continue
        try:
            if value in above:
                raise ConstructorError(None, None, "an anchor that holds itself", value.start_mark)
            yield (*prefix, key), _Loader("").construct_document(value), mark.line + 1
        except (yaml.YAMLError, RecursionError) as error:
            said = f"{_dotted((*prefix, key))}: {_yaml_problem(error)}"
            raise ConstructorError(None, None, said, mark) from error


def _entries(node: yaml.MappingNode, prefix: KeyPath) -> Iterator[tuple[str, yaml.Node, yaml.Mark]]:
    """(key, value, where the key stands) of a mapping. Raises ConstructorError for no key, or the same twice."""
    seen: dict[str, int] = {}
    for key_node, value in node.value:
        mark = key_node.start_mark
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConstructorError(None, None, f"a key must be a single word, not {_kind(key_node)}", mark)
        key = str(key_node.value)
        if key == "<<":
            raise ConstructorError(None, None, "YAML merge keys (<<) are not read; write the keys out", mark)
        if key in seen:
            said = f"key {_dotted((*prefix, key))} is given twice, first on line {seen[key]}; remove one"
            raise ConstructorError(None, None, said, mark)
        seen[key] = mark.line + 1
        yield key, value, mark


def _explain(schema: type[BaseModel], layers: Layers, errors: list[ErrorDetails]) -> NoReturn:
    """Raise the one line for the most telling error: a wrong key first, since it often causes a missing one."""
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    path = _written(first, layers.data)
    key = _dotted(path)
    where = layers.where(path[:-1] if first["type"] == "missing" else path)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if first["type"] == "extra_forbidden":
        raise UserError(f"{where}: unknown key {key}{_nearest_key(schema, path, first['input'])}{more}")
    if first["type"] == "missing":
        raise UserError(f"{where}: key {key} is missing and has no default{more}")
    said = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected", 1)
    said = re.sub("expected (greater|less)", r"expected a number \1", said)
    if first["type"] in ("model_type", "tuple_type"):
        one = first["input"] if isinstance(first["input"], str) else "a, b"
        said = "expected a section of keys" if first["type"] == "model_type" else f"expected a list, as in [{one}]"
    if first["type"] == "value_error":
        raise UserError(f"{where}: {key + ': ' if key else ''}{said}{more}")
    near = ""
    if first["type"] == "literal_error":
        near = _nearest(str(first["input"]), re.findall(r"'([^']+)'", said))
    elif first["type"] == "model_type":
        near = _nearest(key, [_dotted(k) for k in keys_of(schema) if k[:-1] == path[:-1] and k != path])
    raise UserError(f"{where}: {key}: {said}, got {_short(first['input'])}{near}{more}")


def _written(error: ErrorDetails, data: Mapping[str, Any]) -> KeyPath:
    """The key path as the user wrote it: without the names of union members that pydantic puts in between."""
    path: list[str | int] = []
    node: Any = data
    for n, part in enumerate(error["loc"]):
        known = part in node if isinstance(node, dict) else isinstance(node, list) and isinstance(part, int)
        if known:
            node = node[part]
        elif error["type"] != "missing" or n < len(error["loc"]) - 1:
            continue
        path.append(part)
    return tuple(path)


def _refuse_bool_as_number(config: BaseModel, layers: Layers) -> None:
    """pydantic reads `true` as 1; a user who wrote it mistook the key."""

    def walk(given: Any, made: Any, path: KeyPath) -> None:
        if isinstance(given, Mapping) and isinstance(made, Mapping):
            for key, value in given.items():
                walk(value, made[key], (*path, key))
        elif isinstance(given, bool) and not isinstance(made, bool):
            raise UserError(f"{layers.where(path)}: {_dotted(path)}: expected a number, got {str(given).lower()}")

    walk(layers.data, config.model_dump(), ())


def keys_of(schema: type[BaseModel]) -> Iterator[KeyPath]:
    """Every key of a config, sections first."""
    for name, info in schema.model_fields.items():
        yield (name,)
        for part in _models(info.annotation):
            for rest in keys_of(part):
                yield (name, *rest)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The config types an annotation allows: `X`, `X | None`, `X | Y`."""
    if get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from _models(part)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


def _nearest_key(schema: type[BaseModel], path: KeyPath, value: Any) -> str:
    """`; did you mean optim.b1?`: a key that ends in all that was written (`path`, and the keys of its value while they
    are one), else a sibling with a similar name, else the same name elsewhere, else the siblings."""
    known = list(dict.fromkeys(keys_of(schema)))
    whole = path
    while isinstance(value, dict) and len(value) == 1:
        ((key, value),) = value.items()
        whole = (*whole, key)
    if len(whole) > 1 and (inside := [k for k in known if k[-len(whole) :] == whole]):
        return f"; did you mean {_dotted(inside[0])}?"
    siblings = [str(k[-1]) for k in known if k[:-1] == path[:-1]]
    if near := difflib.get_close_matches(str(path[-1]), siblings, 1, 0.5):
        return f"; did you mean {_dotted((*path[:-1], near[0]))}?"
    names = [str(k[-1]) for k in known]
    if near := difflib.get_close_matches(str(path[-1]), names, 1, 0.75):
        return f"; did you mean {_dotted(known[names.index(near[0])])}?"
    return f"; {_dotted(path[:-1]) or 'the top level'} has {', '.join(siblings)}" if siblings else ""


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, 1, 0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _dotted(path: KeyPath) -> str:
    return ".".join(str(p) for p in path)


def _short(value: Any) -> str:
    text = "null" if value is None else " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a single value"


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())
