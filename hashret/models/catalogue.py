"""The members of the family by name, and their settings, without loading PyTorch.

A member is loaded when it is asked for. Its settings are the keyword-only parameters of its class and its base classes,
which stand in their files with literal defaults: they are read from there.
"""

import ast
import math
from collections.abc import Iterator, Mapping, MutableMapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hashret.errors import choose

if TYPE_CHECKING:
    from hashret.models.base import Member


class Catalogue(MutableMapping[str, "type[Member]"]):
    """Classes by name: given as "MODULE:CLASS" they are imported on first use."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places: dict[str, str | type[Member]] = dict(places)

    def __getitem__(self, name: str) -> "type[Member]":
        place = self._places[name]
        if isinstance(place, str):
            module, _, member = place.partition(":")
            loaded: type[Member] = getattr(import_module(module), member)
            return loaded
        return place

    def __setitem__(self, name: str, member: "type[Member]") -> None:
        self._places[name] = member

    def __delitem__(self, name: str) -> None:
        del self._places[name]

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def settings(self, name: str) -> dict[str, Any]:
        """The settings of a member with their defaults: as `Member.defaults` gives, without importing it."""
        place = self._places[name]
        return dict(_settings(*place.split(":"))) if isinstance(place, str) else place.defaults()

    def check(self, model: str, bits: int, head: str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings given, each of the type of its default; raises ValueError for a name, a number of bits or a
        setting that there is not. What else may be wrong with a value shows when the member is built."""
        from hashret.codes import check_bits  # late: for NumPy
        from hashret.heads import HEADS

        choose(self._places, model, "model")
        check_bits(bits)
        if head is not None:
            choose(HEADS, head, "head")
        defaults, checked = self.settings(model), dict(settings)
        known = ", ".join(f"{key}={value}" for key, value in defaults.items()) or "none"
        for name, value in settings.items():
            if name not in defaults:
                raise ValueError(f"model {model!r} has no setting {name!r}; it has {known}")
            kind = type(defaults[name])
            if kind is float and type(value) is int and abs(value) < 2**53:
                checked[name] = float(value)
            elif type(value) is not kind or (kind is float and not math.isfinite(value)):
                raise ValueError(f"setting {name!r} is a {kind.__name__} such as {defaults[name]!r}, not {value!r}")
            elif kind is int and abs(value) >= 2**24:  # sizes that PyTorch could not even count the weights of
                raise ValueError(f"setting {name!r} must be less than 2²⁴, not {value}")
        return checked


@cache
def _settings(module: str, name: str) -> Mapping[str, Any]:
    """The keyword-only parameters of a class and, if it passes others on to them, of its base classes."""
    module, found = _definition(module, name)
    assert isinstance(found, ast.ClassDef)
    inherited: dict[str, Any] = {}
    for base in reversed(found.bases):
        if isinstance(base, ast.Name):  # not nn.Module
            inherited |= _settings(module, base.id)
    own = [node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    if not own:
        return inherited
    parameters = own[0].args
    pairs = zip(parameters.kwonlyargs, parameters.kw_defaults, strict=True)
    given = {parameter.arg: _value(module, default) for parameter, default in pairs if default is not None}
    return inherited | given if parameters.kwarg else given


def _value(module: str, node: ast.AST) -> Any:
    if isinstance(node, ast.Name):
        return _value(*_definition(module, node.id))
    return ast.literal_eval(node)  # raises ValueError for what is no literal


def _definition(module: str, name: str) -> tuple[str, ast.AST]:
    """A class or the value of a constant, by its name in a module, and the module where it is defined."""
    for node in _tree(module).body:
        match node:
            case ast.ClassDef() if node.name == name:
                return module, node
            case ast.Assign(targets=[ast.Name(id=target)]) if target == name:
                return module, node.value
            case ast.ImportFrom(module=str(origin)):
                for alias in node.names:
                    if name == (alias.asname or alias.name):
                        return _definition(origin, alias.name)
    raise LookupError(f"{module} does not define {name}")


@cache
def _tree(module: str) -> ast.Module:
    spec = find_spec(module)
    source: str | None = spec.loader.get_source(module) if spec and spec.loader else None  # type: ignore[attr-defined]
    if source is None:
        raise LookupError(f"the source of {module} is not there")
    return ast.parse(source)
