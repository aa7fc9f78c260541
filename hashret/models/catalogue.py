"""The members of the family and their settings by name, without loading PyTorch.

A member is imported on first use. Its settings are the keyword-only parameters of its class and base classes. Their
defaults are literals or constants, so that they can be parsed from the source.
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
    """A mapping from names to member classes. A class given as "MODULE:CLASS" is imported on first use."""

    def __init__(self, members: Mapping[str, str]) -> None:
        self._members: dict[str, str | type[Member]] = dict(members)

    def __getitem__(self, name: str) -> "type[Member]":
        member = self._members[name]
        if isinstance(member, str):
            module, _, class_name = member.partition(":")
            imported: type[Member] = getattr(import_module(module), class_name)
            return imported
        return member

    def __setitem__(self, name: str, member: "type[Member]") -> None:
        self._members[name] = member

    def __delitem__(self, name: str) -> None:
        del self._members[name]

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def settings(self, name: str) -> dict[str, Any]:
        """Return a member's settings with their defaults, as `Member.defaults` does, without importing it."""
        member = self._members[name]
        return dict(_settings(*member.split(":"))) if isinstance(member, str) else member.defaults()

    def check(self, model: str, bits: int, head: str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings, converted to the types of their defaults.

        Raise ValueError for an unknown model, head or setting, an invalid number of bits, or a value of the wrong type.
        The member's constructor checks the ranges of values.
        """
        from hashret.codes import check_bits  # late, because it imports NumPy
        from hashret.heads import HEADS

        choose(self._members, model, "model")
        check_bits(bits)
        if head is not None:
            choose(HEADS, head, "head")
        defaults, checked = self.settings(model), dict(settings)
        available = ", ".join(f"{key}={value}" for key, value in defaults.items()) or "none"
        for name, value in settings.items():
            if name not in defaults:
                raise ValueError(f"model {model!r} has no setting {name!r}; it has {available}")
            expected = type(defaults[name])
            if expected is float and type(value) is int and abs(value) < 2**53:
                checked[name] = float(value)
            elif type(value) is not expected or (expected is float and not math.isfinite(value)):
                raise ValueError(f"setting {name!r} is a {expected.__name__} such as {defaults[name]!r}, not {value!r}")
            elif expected is int and abs(value) >= 2**24:  # PyTorch overflows when it counts the weights of such sizes
                raise ValueError(f"setting {name!r} must be less than 2²⁴, not {value}")
        return checked


@cache
def _settings(module: str, name: str) -> Mapping[str, Any]:
    """Parse the keyword-only parameters of a class and, if its constructor takes `**kwargs`, of its base classes."""
    module, definition = _definition(module, name)
    assert isinstance(definition, ast.ClassDef)
    inherited: dict[str, Any] = {}
    for base in reversed(definition.bases):
        if isinstance(base, ast.Name):  # not nn.Module
            inherited |= _settings(module, base.id)
    constructors = [n for n in definition.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    if not constructors:
        return inherited
    parameters = constructors[0].args
    pairs = zip(parameters.kwonlyargs, parameters.kw_defaults, strict=True)
    own = {parameter.arg: _value(module, default) for parameter, default in pairs if default is not None}
    return inherited | own if parameters.kwarg else own


def _value(module: str, node: ast.AST) -> Any:
    if isinstance(node, ast.Name):
        return _value(*_definition(module, node.id))
    return ast.literal_eval(node)  # raises ValueError for other expressions


def _definition(module: str, name: str) -> tuple[str, ast.AST]:
    """Return the module that defines a name known in `module`, and the class or the constant's value."""
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
        raise LookupError(f"the source of {module} is missing")
    return ast.parse(source)
