"""Settings from TOML files and overrides: parse, validate, describe, write.

A setting lives beside the code that obeys it, as a field of a pydantic class; the docstring under the field is what
`--help` prints. Every mistake of a file is collected and said at once, a line each.
"""

import difflib
import importlib
import json
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

import pydantic
import tomli

ROOT = Path(__file__).resolve().parent.parent


class UserError(Exception):
    """The user's input is wrong: one clear line each, naming the thing, the value and the remedy. Exit status 2."""

    def __init__(self, *lines: str):
        super().__init__("\n".join(lines))
        self.lines = list(lines)


class Config(pydantic.BaseModel):
    """A section of settings: unknown keys and wrong types are refused, nothing is converted in silence."""

    model_config = pydantic.ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )
    unchanged_result: typing.ClassVar[set[str]] = set()
    """keys that a continued run may change: they name no other experiment"""


class DataConfig(Config):
    """What every file of data/ understands."""

    unchanged_result: typing.ClassVar[set[str]] = {"root"}
    name: str
    """file of data/ that reads this data"""
    label: str = ""
    """name of the data in run folders and trackers; default: the bundled set's name or the TOML's stem"""
    root: str = ""
    """folder where relative paths start; default: $PLAINLOOP_DATA, else the working folder"""

    def path(self, name: str) -> Path:
        return Path(self.root, name)


class ModelConfig(Config):
    """What every file of models/ understands."""

    name: str
    """file of models/ that has the architecture"""
    label: str = ""
    """name of the model in run folders and trackers; default: the pretrained name or the file's"""


def listing(folder: str) -> list[str]:
    """Names that `<folder>.name` may take: the files of the folder."""
    return sorted(p.stem for p in (ROOT / folder).glob("*.py") if not p.stem.startswith("_"))


def module(folder: str, name: Any) -> types.ModuleType:
    """The file of models/ or data/ that a name means. Raises UserError for a name without a file."""
    names = listing(folder)
    if name not in names:
        key = "model" if folder == "models" else folder
        raise UserError(f"{key}.name = {name!r}: there is no {folder}/{name}.py{suggestion(str(name), names)}")
    return importlib.import_module(f"{folder}.{name}")


def suggestion(word: str, known: typing.Iterable[str]) -> str:
    by_lower = {name.lower(): name for name in sorted(known)}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {by_lower[near[0]]}?" if near else f"; known: {', '.join(by_lower.values())}"


def read_toml(path: str | Path) -> dict[str, Any]:
    """Raises UserError that names the file and, for a syntax error, its line and column."""
    try:
        return tomli.loads(Path(path).read_bytes().decode())
    except tomli.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid TOML: it must be UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror.lower()}; --config takes a TOML such as conf/digits.toml") from None


def merge(values: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Sections merge key by key; what stands under a key, free tables too, is replaced whole."""
    merged = dict(values)
    for name, section in later.items():
        old = merged.get(name)
        merged[name] = {**old, **section} if isinstance(old, dict) and isinstance(section, dict) else section
    return merged


def apply_override(values: dict[str, Any], text: str, classes: dict[str, type[Config]]) -> None:
    """Set one `section.key=value` in place; a deeper key sets an entry of a free table (`boost.params.max_bin=63`)."""
    key, sign, raw = text.partition("=")
    section, _, rest = key.strip().partition(".")
    name, *deeper = rest.split(".", 1)
    if not sign or not name:
        raise UserError(f"{text!r}: an override is section.key=value, such as optim.lr=3e-4")
    field = None if deeper or section not in classes else classes[section].model_fields.get(name)
    wanted = type_name(field.annotation) if field else ""
    value: Any = raw
    # A key that takes a string, or one of several, takes the text as it stands.
    if not wanted or any(part != "str" and not part.startswith('"') for part in re.split(" / | or ", wanted)):
        try:
            value = tomli.loads(f"value = {raw}")["value"]
        except tomli.TOMLDecodeError:
            if field:
                kind = type(field.get_default(call_default_factory=True))
                example = {list: '["a", "b"]', dict: "{ key = 1 }", bool: "true"}.get(kind, "1")
                raise UserError(f"{key} = {raw!r}: must be a TOML value of type {wanted}, such as {example}") from None
    # Names of tune.space hold dots themselves.
    *path, last = [name, *deeper] if (section, name) == ("tune", "space") else rest.split(".")
    table = values.setdefault(section, {})
    if isinstance(table, dict):  # else it is refused when it is validated
        for part in path:
            table[part] = table[part] if isinstance(table.get(part), dict) else {}
            table = table[part]
        table[last] = value


def type_name(annotation: Any) -> str:
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return " / ".join(map(json.dumps, arguments))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(type_name(value) for value in arguments if value is not type(None))
    return str(annotation) if arguments else getattr(annotation, "__name__", str(annotation))


def validate(name: str, section: type[Config], values: Any) -> tuple[Config | None, list[str]]:
    """One section's settings, or a line for each mistake in it."""
    if not isinstance(values, dict):
        return None, [f"{name} = {values!r}: must be a section, such as [{name}]"]
    try:
        return section.model_validate(values), []
    except pydantic.ValidationError as error:
        return None, [error_line(name, section, item) for item in error.errors()]


def error_line(name: str, section: type[Config], item: Any) -> str:
    # Only the first part of a location is a key of ours; the rest is pydantic's own account of unions and items.
    key = ".".join([name, *(str(part) for part in item["loc"][:1])])
    if item["type"] == "extra_forbidden":
        return f"{key} = {item['input']!r}: unknown key{suggestion(str(item['loc'][0]), section.model_fields)}"
    if item["type"] == "missing":
        return f"{key}: missing; {section.model_fields[item['loc'][0]].description or 'it has no default'}"
    rule = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return f"{key} = {item['input']!r}: {rule}" if item["loc"] else f"{name}: {rule}"


def describe(classes: dict[str, type[Config]]) -> str:
    """Every key with type, default and meaning, for --help."""
    lines = []
    for name, section in classes.items():
        lines.append(f"\n[{name}]")
        for key, field in section.model_fields.items():
            default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
            lines.append(f"  {name}.{key}  ({type_name(field.annotation)}, {default})")
            lines.append(f"      {' '.join((field.description or '').split())}")
    return "\n".join(lines)


def dump_toml(values: dict[str, dict[str, Any]]) -> str:
    """TOML of resolved settings. TOML has no null: a key that is None is left out and reads back as its default."""
    import tomli_w

    return tomli_w.dumps({name: {k: v for k, v in section.items() if v is not None} for name, section in values.items()})


def fail(error: UserError) -> None:
    for line in error.lines:
        print(f"error: {line}", file=sys.stderr)
