"""From the command line to frozen settings: the only file that knows ml_collections.

A config file builds one `ConfigDict`; `section` makes its parts from the frozen dataclasses the rooms
define, so each default stands in one place; `build` turns a part back into its dataclass, so that
`jit` sees hashable values.
"""

import dataclasses
import importlib
import json
import pathlib
import re
import sysconfig
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import ml_collections
from absl import flags
from ml_collections import config_flags

from gtalign_jax.errors import UserError, naming
from gtalign_jax.files import drafts


class _Dataclass(Protocol):
    """An instance of any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


T = TypeVar("T", bound=_Dataclass)
V = TypeVar("V")
_OVERRIDE = re.compile(r"--?(?:no)?config\.([\w.]+)")
# Where the frames of a traceback are not the user's own.
_LIBRARIES = ("<", str(pathlib.Path(__file__).parent), *sysconfig.get_paths().values())
Explain = Callable[[ml_collections.ConfigDict | None], str]


def section(cls: type, **overrides: Any) -> ml_collections.ConfigDict:
    """The fields of a dataclass, with its defaults and these overrides, as a ConfigDict."""
    values = dataclasses.asdict(cls(**overrides))
    return ml_collections.ConfigDict({k: v for k, v in values.items() if v is not None})


def build(cls: type[T], config: Mapping[str, Any], path: str) -> T:
    """The dataclass `cls` from a ConfigDict section.

    path: the section's name, for the message. Raises UserError on a field the class does not have or
    a value it refuses, which its ValueError names first (`lr=0: must be positive`).
    """
    names = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(config) - names)
    if unknown:
        raise UserError(f"config.{path}.{unknown[0]}: no such field; known: {', '.join(sorted(names))}")
    types = typing.get_type_hints(cls)
    values = {k: _plain(v, types[k], f"{path}.{k}") for k, v in config.items()}
    try:
        with naming(f"config.{path}."):
            return cls(**values)
    except TypeError as error:
        raise UserError(f"config.{path}: {error}") from error


def _plain(value: Any, kind: Any, path: str) -> Any:
    """Lists as tuples, and a section inside a section as its own dataclass."""
    nested = isinstance(value, Mapping | ml_collections.ConfigDict)
    if nested and isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return build(kind, value, path)
    return tuple(value) if isinstance(value, list) else value


def load_symbol(path: str, where: str) -> Callable[..., Any]:
    """The function at `module:function`. where: the field or flag it was named in, for the UserError."""
    found = _loaded(path, where, "function")
    if not callable(found):
        raise UserError(f"{where}={path!r}: {path.partition(':')[2]} is not a function")
    return found


def load_value(path: str, where: str, kind: type[V]) -> V:
    """The value of this type at `module:NAME`. where: as in `load_symbol`."""
    found = _loaded(path, where, "NAME")
    if not isinstance(found, kind):
        raise UserError(f"{where}={path!r}: {path.partition(':')[2]} is not a {kind.__name__}")
    return found


def _loaded(path: str, where: str, what: str) -> Any:
    """What stands at `module:name`; whatever another's module raises as it is imported is one line."""
    module, _, name = path.partition(":")
    if not module or not name:
        raise UserError(f"{where}={path!r}: write module:{what}")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # of the user's module, of any kind
        says_it = isinstance(error, ImportError | AttributeError | SyntaxError)
        kind = "" if says_it else f"{type(error).__name__}: "
        raise UserError(f"{where}={path!r}: {kind}{' '.join(str(error).split())}") from error


def check_call(where: str, call: Callable[[], Any]) -> Any:
    """What the user's function gives on trial arguments; UserError in one line when it does not take them."""
    try:
        return call()
    except UserError:
        raise
    except Exception as error:  # of the user's code, of any kind; a ValueError names its field
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise UserError(f"{where}: {kind}{_one_line(error)}") from error


def parse_command(
    argv: Sequence[str],
    required: Mapping[str, str],
    optional: Mapping[str, str] | None = None,
    explain: Explain | None = None,
) -> tuple[ml_collections.ConfigDict, dict[str, str]]:
    """Read `--config=FILE[:variant] --config.a.b=v` and the named string flags.

    required, optional: flag name to help text. explain: what `--help` says of a config's fields. Returns the
    locked config and the flags' values (optional ones default to ""). Raises UserError with one line on an
    unknown flag or field, a wrong type, a missing flag, or a config file that is not there or fails, with the
    line where it does.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "experiment config", flag_values=values, sys_argv=list(argv)
    )
    optional = optional or {}
    for name, text in {**required, **optional}.items():
        flags.DEFINE_string(name, "", text, flag_values=values)
    flags.DEFINE_bool("help", False, "show this help", flag_values=values)
    try:
        rest = values(list(argv))
        config = values.config
        if values["config"].present:
            _check_kind(config)
    except Exception as error:  # a config file may raise anything
        raise UserError(_fault_of_file(error, argv) or _unknown_field(argv) or _one_line(error)) from error
    if values.help:
        print(_help({**required, **optional}, explain, config))
        raise SystemExit(0)
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; flags are written --name=value")
    for name in ("config", *required):
        if not values[name].value:
            raise UserError(f"--{name} is missing ({required.get(name, 'configs/NAME.py[:variant]')})")
    return config, {name: values[name].value or "" for name in (*required, *optional)}


def _help(texts: Mapping[str, str], explain: Explain | None, config: ml_collections.ConfigDict | None) -> str:
    """What `--help` prints: the flags, and the fields of the config that was named, else of the defaults."""
    lines = ["--config=FILE.py[:variant]  --config.SECTION.FIELD=VALUE"]
    lines += [f"--{name}=...  {text}" for name, text in texts.items()]
    return "\n".join([*lines, "", explain(config)] if explain else lines)


def to_json(config: ml_collections.ConfigDict) -> str:
    """The config as stable JSON, the text of `config.json`."""
    return json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n"


def _fault_of_file(error: BaseException, argv: Sequence[str]) -> str | None:
    """`FILE:LINE: what` of an error that a config file made, itself or in a module of the user's that it
    imports; what a UserError says; None when the file is not at fault."""
    chain = list(_chain(error))
    for found in reversed(chain):
        if isinstance(found, UserError):
            return str(found)
    for found in chain:
        text = f"{type(found).__name__}: {_one_line(found)}"
        if isinstance(found, SyntaxError) and found.filename:
            return f"{found.filename}:{found.lineno}: {text}"
        frames = traceback.extract_tb(found.__traceback__)
        theirs = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
        if theirs:
            return f"{theirs[-1].filename}:{theirs[-1].lineno}: {text}"
    file = next((arg for arg in argv if arg.startswith(("--config=", "-config="))), "--config")
    about = [found for found in chain if "get_config" in str(found)]  # none there, or of another kind
    return f"{file}: {_one_line(about[-1])}" if about else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it, the first to be raised last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _unknown_field(argv: Sequence[str]) -> str | None:
    """The line about the first override whose field the config file does not have; None if none is wrong."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=[])
    try:
        values([arg for arg in argv if not _OVERRIDE.match(arg)], known_only=True)
        _check_kind(values.config)
    except UserError:
        raise
    except Exception:
        return None  # the file itself is wrong
    for match in filter(None, map(_OVERRIDE.match, argv)):
        section, path = values.config, "config"
        for name in match[1].split("."):
            if not isinstance(section, ml_collections.ConfigDict):
                break
            path = f"{path}.{name}"
            if name not in section:
                return f"--{path}: no such field; known: {', '.join(sorted(section))}"
            section = section[name]
    return None


def _check_kind(config: Any) -> None:
    """UserError for what a file gave that is no config; raises what kept the file from being read."""
    getattr(config, "lock", None)
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"--config: get_config() returned {type(config).__name__} and no ConfigDict")


def _one_line(error: BaseException) -> str:
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]  # what was raised first
    text = str(error.args[0]) if error.args else ""  # str() of a KeyError is quoted, with escapes
    text = text.removeprefix("Configuration is not available because of an earlier failure to load:")
    return " ".join(text.split()) or type(error).__name__


def writable_directory(path: str, flag: str) -> pathlib.Path:
    """Create a folder and prove that it can be written; UserError names the flag when it cannot."""
    return drafts.make_folder(path, flag)
