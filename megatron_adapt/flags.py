"""Turn a recipe (TOML) and the command line into one frozen config, and run a tool with it.

The recipe gives the defaults, the command line has the last word. A TOML key that no config class knows
is refused with the nearest known name. ``--help`` imports neither torch nor megatron.
"""

import logging
import os
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from megatron_adapt.errors import AdaptError, ConfigError
from megatron_adapt.logs import is_main_rank, setup_logging
from megatron_adapt.recipe import Recipe, read_recipe

ConfigT = TypeVar("ConfigT")
USER_ERROR = 2


def load_config(kind: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """Build the config of a tool from its flags; every setting is a flat flag.

    Raises:
        SystemExit: code 2 on a wrong flag or value (the message is on standard error), 0 on ``--help``.
    """
    _prepare_process()
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return tyro.cli(kind, args=args, config=(tyro.conf.OmitArgPrefixes,), description=kind.__doc__)
    except AdaptError as error:
        _exit(error)


def load_command(kinds: Mapping[str, type[Any]], argv: Sequence[str] | None = None) -> tuple[str, Any]:
    """Build the config of a tool that has several commands; the first argument names one.

    Returns:
        The command's name and its config.

    Raises:
        SystemExit: as ``load_config``; also without a command, or with an unknown one.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] and args[0] in kinds:
        return args[0], load_config(kinds[args[0]], args[1:])
    listed = "\n".join(f"  {name:10}{(kind.__doc__ or '').splitlines()[0]}" for name, kind in kinds.items())
    if {"-h", "--help"} & set(args[:1]):
        sys.stdout.write(
            f"usage: {Path(sys.argv[0]).name} COMMAND [flags]; every command has its own --help\n{listed}\n"
        )
        raise SystemExit(0)
    _exit(ConfigError(f"{args[0] if args else 'no command'}: not one of {', '.join(kinds)}; add --help"))


def _prepare_process() -> None:
    """Set what must be set before torch and transformers are imported."""
    setup_logging()
    # Threads that spin while they wait make two threads ten times slower than one when another job has a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Ours are the progress bars that a log file can hold.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def load_recipe(argv: Sequence[str] | None = None, *, stage: bool = False) -> tuple[Recipe, str]:
    """Build a ``Recipe`` from ``--recipe FILE`` and flags such as ``--train.seq-length 512`` over it.

    Args:
        argv: the command line without the program's name; None takes that of the process.
        stage: whether the tool takes ``--stage NAME``.

    Returns:
        The recipe and the stage's name (empty when ``stage`` is off).
    """
    _prepare_process()
    args = list(sys.argv[1:] if argv is None else argv)
    name, args = _take_flag(args, "--stage") if stage else ("", args)
    try:
        path, args = _take_recipe(args)
        if stage and name is None and path is not None and not {"-h", "--help"} & set(args):
            raise ConfigError("--stage: missing; name a stage of the recipe")
        default = read_recipe(Path(path)) if path else None
        described = f"{Recipe.__doc__} Flags: --recipe FILE" + (" --stage NAME" if stage else "")
        config = (tyro.conf.AvoidSubcommands,)  # or an optional table would be no flags but a subcommand
        description = described + ", then any setting below."
        if default is None:
            return tyro.cli(Recipe, args=args, description=description, config=config), name or ""
        return tyro.cli(Recipe, default=default, args=args, description=description, config=config), name or ""
    except AdaptError as error:
        _exit(error)


def load_recipe_with(kind: type[ConfigT], argv: Sequence[str] | None = None) -> tuple[Recipe, ConfigT]:
    """Build a ``Recipe`` and the config of a tool that reads one: flags that are fields of ``kind`` go to the config.

    Args:
        kind: dataclass of the tool; none of its fields is named like one of ``Recipe``.
        argv: the command line without the program's name; None takes that of the process.

    Raises:
        SystemExit: as ``load_config``; also without ``--recipe``.
    """
    _prepare_process()
    try:
        path, args = _take_recipe(list(sys.argv[1:] if argv is None else argv))
        recipe: Any = Annotated[Recipe, tyro.conf.arg(name="")]
        default: Any = field(default=read_recipe(Path(path))) if path else field()
        parts: list[Any] = [("tool", Annotated[kind, tyro.conf.arg(name="")]), ("recipe", recipe, default)]
        both = make_dataclass("both", parts, kw_only=True)
        description = f"{kind.__doc__} Flags: --recipe FILE, those of the tool, and any setting of the recipe."
        config = (tyro.conf.AvoidSubcommands,)
        found: Any = tyro.cli(both, args=args, description=description, config=config)
        return found.recipe, found.tool
    except AdaptError as error:
        _exit(error)


def _take_recipe(args: list[str]) -> tuple[str | None, list[str]]:
    """Take ``--recipe FILE`` out of ``args``; only who asks for help may leave it out."""
    path, args = _take_flag(args, "--recipe")
    if path is None and not {"-h", "--help"} & set(args):
        raise ConfigError("--recipe: missing; name a recipe such as examples/quickstart/recipe.toml")
    return path, args


def _take_flag(args: list[str], flag: str) -> tuple[str | None, list[str]]:
    """Take ``flag VALUE`` or ``flag=VALUE`` out of ``args``."""
    for at, arg in enumerate(args):
        if arg == flag and at + 1 < len(args):
            return args[at + 1], [*args[:at], *args[at + 2 :]]
        if arg.startswith(f"{flag}="):
            return arg.removeprefix(f"{flag}="), [*args[:at], *args[at + 1 :]]
    return None, args


def to_flags(config: Any) -> list[str]:
    """Return the command line that makes this config of a tool; ``load_config`` is the inverse."""
    flags: list[str] = []
    for item in fields(config):
        value, flag = getattr(config, item.name), f"--{item.name.replace('_', '-')}"
        if is_dataclass(value):
            flags += to_flags(value)
        elif isinstance(value, bool):
            flags += [flag if value else flag.replace("--", "--no-", 1)]
        elif isinstance(value, tuple):
            flags += [flag, *map(str, value)] if value else []
        elif isinstance(value, dict):
            flags += [flag, *map(str, chain.from_iterable(value.items()))] if value else []
        elif value is not None:
            flags += [flag, str(value)]
    return flags


def split_pairs(pairs: Sequence[str], flag: str) -> dict[str, list[Path]]:
    """Read ``NAME=PATH`` arguments; a name given several times collects its paths.

    Raises:
        ConfigError: an argument has no name or no path.
    """
    found: dict[str, list[Path]] = {}
    for pair in pairs:
        name, _, path = pair.partition("=")
        if not name or not path:
            raise ConfigError(f"{flag}: {pair!r} is not NAME=PATH")
        found.setdefault(name, []).append(Path(path))
    return found


def run_tool(entry: Callable[..., object], *args: object) -> None:
    """Call a stage's entry function; print a user's mistake as one line and exit with code 2."""
    try:
        entry(*args)
    except AdaptError as error:
        _exit(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _exit(error: AdaptError) -> typing.NoReturn:
    # One line per machine: a mistake may be one machine's alone, such as a folder it does not see.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        rank = "" if is_main_rank() else f"rank {os.environ['RANK']}: "
        sys.stderr.write(f"error: {rank}{' '.join(str(error).split())}\n")
    logging.shutdown()
    raise SystemExit(USER_ERROR) from None
