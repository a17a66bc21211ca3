"""Code of the user's own: ``package.module:function`` and ``path/to/file.py:function``, found, called, and blamed."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def one_line(error: BaseException, most: int = 300) -> str:
    """``Type: message`` of an exception on one line of at most ``most`` characters."""
    text = " ".join(f"{type(error).__name__}: {error}".rstrip(": ").split())
    return text if len(text) <= most else text[: most - 3] + "..."


def names_code(spec: str) -> bool:
    """Whether ``spec`` has the form of ``package.module:function`` or ``path/to/file.py:function``."""
    place, colon, name = spec.rpartition(":")
    return bool(colon) and name.isidentifier() and (place.endswith(".py") or bool(_DOTTED.fullmatch(place)))


def find(spec: str) -> Any:
    """What ``spec`` names, importing its module with the current directory (and the file's own) importable.

    ``sys.path`` is as before afterwards, and a module that fails is not left in ``sys.modules``. A file is imported
    once as long as it does not change. Raises ValueError for a spec of another form, for a module that raises and for
    a name it lacks, FileNotFoundError for a file that is not there; all name the spec.
    """
    if not names_code(spec):
        raise ValueError(f"{spec!r} must be package.module:function or path/to/file.py:function")
    place, _, name = spec.rpartition(":")
    importlib.invalidate_caches()  # the file may be newer than the last look at its folder
    with importable(spec):
        module = _from_file(Path(place), spec) if place.endswith(".py") else _from_name(place, spec)
    try:
        return getattr(module, name)
    except AttributeError as error:
        raise ValueError(f"{spec!r}: {place} has no {name!r}") from error


def call(spec: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, which belongs to the user: importable as it was found, and blamed."""
    with importable(spec), blaming(repr(spec)):
        return function(*args, **kwargs)


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Whatever foreign code raises in the block becomes a ValueError of one line that starts with ``what``, chained."""
    try:
        yield
    except (Exception, SystemExit) as error:  # any exception of foreign code is that code's answer
        raise ValueError(f"{what} raised {one_line(error)}") from error


@contextmanager
def importable(spec: str) -> Iterator[None]:
    """The current directory, and that of a file named by ``spec``, on ``sys.path`` while the block runs."""
    before = list(sys.path)
    place = spec.rpartition(":")[0]
    sys.path.insert(0, str(Path.cwd()))
    if place.endswith(".py"):
        sys.path.insert(0, str(Path(place).resolve().parent))
    try:
        yield
    finally:
        sys.path[:] = before


def _from_name(name: str, spec: str) -> ModuleType:
    before = set(sys.modules)
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # as in blaming
        for new in [key for key in sys.modules if key not in before and _is_part(key, name)]:
            del sys.modules[new]  # a package whose module fails would be found half filled by the next import
        if isinstance(error, ModuleNotFoundError) and error.name and _is_part(error.name, name):
            raise ValueError(f"{spec!r}: there is no module {error.name!r} here or on the Python path") from error
        raise ValueError(f"{spec!r}: importing {name} raised {one_line(error)}") from error


def _is_part(module: str, name: str) -> bool:
    """Whether ``module`` is ``name`` or one of the packages around it."""
    return name == module or name.startswith(f"{module}.")


def _from_file(path: Path, spec: str) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"{spec!r}: there is no file {str(path)!r}")
    path = path.resolve()
    source = path.read_bytes()
    content = hashlib.sha256(str(path).encode() + b"\0" + source).hexdigest()[:16]
    name = f"{path.stem}_{content}" if path.stem.isidentifier() else f"file_{content}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise ValueError(f"{spec!r}: {str(path)!r} can not be imported as Python")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickles look themselves up there
    try:
        # Not by the loader, which would leave a __pycache__ beside the user's file.
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
    except (Exception, SystemExit) as error:  # as in blaming
        del sys.modules[name]
        raise ValueError(f"{spec!r}: importing {path.name} raised {one_line(error)}") from error
    except BaseException:
        del sys.modules[name]
        raise
    return module
