"""`simam identify`: build a module of somebody's file, and say what it computes."""

import argparse
import ast
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ..identify import identify
from ..messages import UserError, first_few, one_line

_TARGET = re.compile(r"(?P<file>.+?\.py):(?P<name>[A-Za-z_]\w*)(?P<arguments>\(.*\))?", re.DOTALL)


def run_identify(options: argparse.Namespace) -> None:
    """Print what the module on the command line computes."""
    module = build_module(options.module)
    try:
        found = identify(module)
    except ValueError as error:
        raise UserError(f"{options.module}: {error}") from error
    print(f"{options.module}\n\n{found}")


def build_module(target: str) -> nn.Module:
    """Build a module from FILE.py:CLASS or FILE.py:CLASS(ARGUMENTS), running the file's code.

    Raises:
        UserError: the target has another form, the file cannot be imported, or the class is
            missing, is no module or cannot be built from the arguments.
    """
    match = _TARGET.fullmatch(target)
    if match is None:
        raise UserError(
            f"expected FILE.py:CLASS or 'FILE.py:CLASS(ARGUMENTS)', got {target!r}, "
            "such as 'models/simam.py:SimAM(64, e_lambda=0.1)'"
        )
    file, name = Path(match["file"]), match["name"]
    positional, named = _parse_arguments(target, match["arguments"] or "()")
    if not file.is_file():
        raise UserError(f"there is no file {file}")
    with _import_paths(file):
        kind = _find_class(_import(file), file, name)
        try:
            inspect.signature(kind).bind(*positional, **named)
        except TypeError as error:
            raise UserError(
                f"{name}{inspect.signature(kind)} does not take these arguments ({error}); give "
                f"them as literals in parentheses, such as '{file}:{name}(64, e_lambda=0.1)'"
            ) from error
        try:
            return kind(*positional, **named)
        except Exception as error:  # the class's own code
            raise UserError(f"{target} cannot be built ({one_line(error)})") from error


def _parse_arguments(target: str, text: str) -> tuple[list[Any], dict[str, Any]]:
    try:
        call = ast.parse(f"f{text}", mode="eval").body
        if not isinstance(call, ast.Call) or any(each.arg is None for each in call.keywords):
            raise ValueError(text)
        named = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
        return [ast.literal_eval(each) for each in call.args], named
    except (SyntaxError, ValueError) as error:
        raise UserError(
            f"the arguments in {target!r} must be literals, such as (64, e_lambda=0.1)"
        ) from error


@contextmanager
def _import_paths(file: Path) -> Iterator[None]:
    """Let the file import its neighbours, or the package that it belongs to, for a while."""
    before = list(sys.path)
    root = _package_root(file)
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path[:] = before


def _package_root(file: Path) -> Path:
    folder = file.resolve().parent
    while (folder / "__init__.py").exists():
        folder = folder.parent
    return folder


def _import(file: Path) -> ModuleType:
    """Import a file: as a part of its package, if it belongs to one, so that it may import that."""
    parts = file.resolve().relative_to(_package_root(file)).with_suffix("").parts
    try:
        if len(parts) > 1:
            return importlib.import_module(".".join(parts).removesuffix(".__init__"))
        spec = importlib.util.spec_from_file_location(f"_identified_{file.stem}", file)
        if spec is None or spec.loader is None:
            raise ImportError(f"cannot load {file}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    except SystemExit as error:
        raise UserError(f"{file} cannot be imported: it exits instead") from error
    except Exception as error:  # the file's own code
        raise UserError(f"{file} cannot be imported ({one_line(error)})") from error
    return module


def _find_class(module: ModuleType, file: Path, name: str) -> type[nn.Module]:
    found = getattr(module, name, None)
    classes = [
        each
        for each, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, nn.Module)
        and value.__module__ == module.__name__
    ]
    listed = first_few(get_close_matches(name, classes, n=3, cutoff=0.4) or classes, 5)
    hint = f"; it has {listed}" if classes else "; it defines no nn.Module"
    if found is None:
        raise UserError(f"{file} has no class {name}{hint}")
    if not (inspect.isclass(found) and issubclass(found, nn.Module)):
        raise UserError(f"{name} in {file} is not a class of nn.Module{hint}")
    return found
