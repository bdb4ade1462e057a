"""Modules that SGLang's imports reach and serving never uses: they are imported when something of theirs is used.

Losses of training bring SciPy, and sharding for training brings torch's compiler: seconds of every start. A name that
is not in the table imports its module at once, as if this module did not exist.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Mapping
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

FUNCTION, MAPPING = "function", "mapping"
TRANSFORMERS: Final = {
    "transformers.loss.loss_utils": {"LOSS_MAPPING": MAPPING},
    "transformers.distributed.fsdp": {
        "is_fsdp_enabled": FUNCTION,
        "is_fsdp_managed_module": FUNCTION,
        "apply_fully_sharded_data_parallelism": FUNCTION,
    },
}
"""Module -> what other modules import from it by name, and what that is."""
_LOCK = threading.RLock()


class DeferredModule(ModuleType):
    """Stands for a module until something of it is used."""

    def __init__(self, name: str, names: Mapping[str, str]) -> None:
        super().__init__(name)
        makers: dict[str, Callable[[str, str], object]] = {FUNCTION: _deferred_function, MAPPING: DeferredMapping}
        self.__dict__.update({each: makers[kind](name, each) for each, kind in names.items()})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(real_module(self.__name__), name)


class DeferredMapping(Mapping[Any, Any]):
    """Stands for a mapping of a deferred module."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def _mapping(self) -> Mapping[Any, Any]:
        found: Mapping[Any, Any] = getattr(real_module(self._module), self._name)
        return found

    def __getitem__(self, key: object) -> Any:
        return self._mapping()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._mapping())

    def __len__(self) -> int:
        return len(self._mapping())


def _deferred_function(module: str, name: str) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        return getattr(real_module(module), name)(*arguments, **options)

    call.__name__ = call.__qualname__ = name
    return call


def real_module(name: str) -> ModuleType:
    """Return the module itself; import it if only its stand-in is there. Raises what the import raises."""
    with _LOCK:
        stand_in = sys.modules[name]
        if not isinstance(stand_in, DeferredModule):
            return stand_in
        package, _, tail = name.rpartition(".")
        spec = importlib.machinery.PathFinder.find_spec(name, sys.modules[package].__path__)
        if spec is None or spec.loader is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            sys.modules[name] = stand_in
            raise
        setattr(sys.modules[package], tail, module)
        return module


class DeferringFinder(MetaPathFinder, Loader):
    """Finds stand-ins for the modules of a table."""

    def __init__(self, table: Mapping[str, Mapping[str, str]]) -> None:
        self.table = table

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the stand-in's specification; None for a module that is not in the table, or that does not exist."""
        del target
        if fullname not in self.table or importlib.machinery.PathFinder.find_spec(fullname, path) is None:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Return the stand-in."""
        return DeferredModule(spec.name, self.table[spec.name])

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: a stand-in is complete when it is made."""


def defer_imports() -> None:
    """Put stand-ins in place of modules that are not imported yet."""
    sys.meta_path.insert(0, DeferringFinder(TRANSFORMERS))


def are_deferred() -> bool:
    """Whether stand-ins are in place."""
    return any(isinstance(finder, DeferringFinder) for finder in sys.meta_path)


def compile_nothing(model: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Replace torch.compile: return the function itself, which TORCHDYNAMO_DISABLE=1 comes to as well."""
    return functools.partial(compile_nothing, **options) if model is None else model


def disable_nothing(fn: Callable[..., Any] | None = None, recursive: bool = True, **options: Any) -> Any:
    """Replace torch.compiler.disable, which would import the compiler to keep it from a function."""
    del recursive
    return functools.partial(disable_nothing, **options) if fn is None else fn


def compile_never() -> None:
    """Let both decorators return what they decorate."""
    import torch

    torch.compile, torch.compiler.disable = compile_nothing, disable_nothing


def compiles_never() -> bool:
    """Whether both decorators are replaced."""
    import torch

    return torch.compile is compile_nothing and torch.compiler.disable is disable_nothing
