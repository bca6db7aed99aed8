"""From YAML text and command line words to a plain, typed tree; knows dataclasses, but no option by name."""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from unisd_jax.errors import ConfigError

_KINDS = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "a mapping",
}


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice; YAML's own habit is to keep the last one silently."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} appears twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return node


def show(value: Any) -> str:
    """`value` on one line of at most 120 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError):  # keys that only YAML allows, or a mapping that contains itself
        text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def suggestion(name: str, known: Sequence[str]) -> str:
    """`; did you mean "x"?` when something in `known` is near to `name`, else the empty string."""
    near = difflib.get_close_matches(name, known, n=1)
    return f'; did you mean "{near[0]}"?' if near else ""


def deep_merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """A new mapping, `top` over `base`: mappings merge recursively, scalars and lists are replaced."""
    merged = dict(base)
    for key, value in top.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = deep_merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def parse_yaml(source: str | bytes, origin: str) -> Any:
    """The plain value of a YAML document.

    Raises:
      ConfigError: not YAML, or a key twice in one mapping; `origin` and the line are named.
    """
    try:
        return yaml.load(source, _Loader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ConfigError(f"{origin}{line}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date, an integer of 5000 digits
        raise ConfigError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None


class Variants:
    """Which variants a configuration file may define, which are `chosen`, and which of those were `found`."""

    def __init__(self, known: Sequence[str], chosen: Sequence[str] = ()):
        self.known, self.chosen = tuple(known), tuple(chosen)
        self.found: set[str] = set()


def read_tree(
    path: Path, variants: Variants, chain: tuple[Path, ...] = (), done: set[Path] | None = None
) -> dict[str, Any]:
    """The mapping in a YAML file, merged over the files that its `inherit` key names.

    `inherit` is one path or a list of paths, relative to the file; later ones win, and the file itself wins
    over all of them. A file that is inherited on several ways counts once, where it is met first: a second time it
    would undo what was set since. A file's chosen `variants` are merged over it, before what inherits it. Both keys are
    absent from the result. `chain` holds the files that led here, `done` those that were merged already.

    Raises:
      ConfigError: unreadable file, not a mapping, malformed `inherit` or `variants`, a cycle (the chain is named).
    """
    try:
        source = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        inherited = f" (inherited by {chain[-1]})" if chain else ""
        reason = getattr(error, "strerror", None) or error
        named = json.dumps(str(path), ensure_ascii=False)
        raise ConfigError(f"cannot read configuration file {named}{inherited}: {reason}") from None
    if path.resolve() in (previous.resolve() for previous in chain):
        raise ConfigError(f"configuration files inherit in a circle: {' -> '.join(map(str, (*chain, path)))}")
    done = set() if done is None else done
    if path.resolve() in done:
        return {}
    done.add(path.resolve())
    tree = parse_yaml(source, str(path))
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of options, found {show(tree)}")

    own = tree.pop("variants", {})
    if not isinstance(own, dict) or not all(isinstance(variant, dict) for variant in own.values()):
        raise ConfigError(f"{path}: variants: expected a mapping from names to options, found {show(own)}")
    for name in own:
        if name not in variants.known:
            hint = suggestion(str(name), variants.known)
            raise ConfigError(f"{path}: variants: expected {', '.join(variants.known)}, found {show(name)}{hint}")
    parents = tree.pop("inherit", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(f"{path}: inherit: expected a path or a list of paths, found {show(parents)}")
    merged: dict[str, Any] = {}
    for parent in parents:
        merged = deep_merge(merged, read_tree(path.parent / parent, variants, (*chain, path), done))
    merged = deep_merge(merged, tree)
    for name in variants.chosen:
        if name in own:
            merged = deep_merge(merged, own[name])
            variants.found.add(name)
    return merged


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"train": {"steps": 1}}` as `{"train.steps": 1}`; lists and empty mappings are leaves."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def walk_options(section: type, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """(dotted name, declared type, field) of every option below a dataclass, in the order of declaration."""
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from walk_options(kind, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", kind, field


def option_table(root: type) -> list[str]:
    """Help lines: every option with its default and type, each section under its docstring."""
    hints, lines, previous = typing.get_type_hints(root), [], None
    for name, kind, field in walk_options(root):
        section = hints[name.partition(".")[0]] if "." in name else root
        if section is not previous:
            lines += ["", section.__doc__]
            previous = section
        default = field.default
        if default is dataclasses.MISSING:
            default = "(required)"
        elif isinstance(default, tuple):
            default = f"[{','.join(default)}]"
        elif not isinstance(default, str):
            default = show(default)
        lines.append(f"  --{name}={default}".ljust(52) + describe(kind))
    return lines


def parse_override(text: str, root: type) -> dict[str, Any]:
    """`--train.steps=20` as `{"train": {"steps": 20}}`; the value is YAML.

    For an option that holds a string, what YAML would read as something else (`--name=007`) stays the text
    that was typed; null is still null.

    Raises:
      ConfigError: another form than `--a.b=c`, a value that is not YAML.
    """
    key, equals, raw = text.removeprefix("--").partition("=")
    if not text.startswith("--") or not equals or not all(key.split(".")):
        raise ConfigError(f"expected an override of the form --section.option=value, found {show(text)}")
    value = parse_yaml(raw, show(text))
    kinds = {name: kind for name, kind, _ in walk_options(root)}
    if kinds.get(key) in (str, str | None) and value is not None and not isinstance(value, str):
        value = raw
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def conform(section: type, tree: Any, root: type, prefix: str = "") -> dict[str, Any]:
    """`tree` with every value in its declared type (tuples as lists), ready for `draccus.decode`.

    draccus alone is too willing: it takes `true` for an integer and a string for a tuple of letters. Accepted
    beside the exact type: an integer or a numeric string (YAML reads `1e-4` as one) for a float.

    `tree` describes the dataclass `section`, whose dotted name with a final dot is `prefix`. `root` is the
    dataclass of the whole configuration, in which the name that an unknown key may have meant is looked for.

    Raises:
      ConfigError: unknown key, wrong type, value outside a choice, missing required option.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{prefix.rstrip('.')}: expected a section of options, found {_found(tree)}")
    hints = typing.get_type_hints(section)
    for key in tree:
        if key not in hints:
            raise ConfigError(_unknown(prefix, key, tree[key], hints, root))

    values: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        name, kind = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(kind):
            values[field.name] = conform(kind, tree.get(field.name, {}), root, f"{name}.")
        elif field.name in tree:
            values[field.name] = _convert(name, kind, tree[field.name])
        elif field.default is dataclasses.MISSING:
            raise ConfigError(f"{name} is missing: set it to {describe(kind)} in the file or with --{name}=...")
    return values


def _unknown(prefix: str, key: Any, value: Any, hints: Mapping[str, Any], root: type) -> str:
    """Names the unknown key and the nearest known one: in the same section, else in any other."""
    name = f"{prefix}{key}"
    meant = [prefix + near for near in difflib.get_close_matches(str(key), hints, n=1)]
    if not meant:  # `lora.rank` for `model.lora.rank`: go by the last part
        name = next(iter(flatten({name: value})))
        leaves = {known: known.rpartition(".")[2] for known, _, _ in walk_options(root)}
        near = difflib.get_close_matches(name.rpartition(".")[2], leaves.values(), n=1)
        meant = [known for known, leaf in leaves.items() if leaf in near]
    hint = f"did you mean {' or '.join(map(show, meant))}?" if meant else f"expected one of {', '.join(hints)}"
    return f"unknown option {show(name)}; {hint}"


def _convert(name: str, kind: Any, value: Any) -> Any:
    """`value` as `kind`, or a ConfigError that names the option, what was found and what was expected."""
    try:
        return _coerce(kind, value)
    except (TypeError, ValueError, OverflowError):
        choices = [choice for choice in typing.get_args(kind) if isinstance(choice, str)]
        hint = suggestion(value, choices) if isinstance(value, str) else ""
        raise ConfigError(f"{name}: expected {describe(kind)}, found {_found(value)}{hint}") from None


def _coerce(kind: Any, value: Any) -> Any:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        if isinstance(value, str) and value in arguments:
            return value
    elif types.NoneType in arguments:
        return None if value is None else _coerce(arguments[0], value)
    elif typing.get_origin(kind) is tuple:
        if isinstance(value, (list, tuple)):
            return [_coerce(arguments[0], item) for item in value]
    elif kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return float(value)
    elif type(value) is kind:
        return value
    raise TypeError


def describe(kind: Any) -> str:
    """A declared type in words: `int | None` is "an integer or null"."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(arguments)}"
    if types.NoneType in arguments:
        return f"{describe(arguments[0])} or null"
    if typing.get_origin(kind) is tuple:
        return "a list of strings"
    return "true or false" if kind is bool else _KINDS[kind]


def _found(value: Any) -> str:
    """A value with its type: `"abc" (a string)`."""
    if value is None:
        return "null"
    return f"{show(value)} ({_KINDS.get(type(value), f'a {type(value).__name__}')})"
