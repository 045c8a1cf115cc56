"""Commands that are imported and built when they are asked for, so that each starts by itself.

Typer looks at every parameter of every command that is registered, before it looks at the words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

Function = Callable[..., None]
Guard = Callable[[str, Function], Function]


class Built(Mapping[str, Any]):
    """Commands by their last word; `places` says where each function stands in this package."""

    def __init__(self, places: Mapping[str, str], guard: Guard, others: Mapping[str, Any]) -> None:
        self._places = {name.rpartition(" ")[2]: (name, place) for name, place in places.items()}
        self._guard, self._built = guard, dict(others)

    def __getitem__(self, word: str) -> Any:
        if word not in self._built:
            name, place = self._places[word]
            module, _, function = place.partition(".")
            found = getattr(import_module(f".{module}", __package__), function)
            one = typer.Typer(add_completion=False, rich_markup_mode=None)
            one.command(word)(self._guard(name, found))
            self._built[word] = typer.main.get_command(one)
        return self._built[word]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._places, **self._built})

    def __len__(self) -> int:
        return len({**self._places, **self._built})


def group_on_demand(places: Mapping[str, str], guard: Guard) -> type[TyperGroup]:
    """A group of the commands at `places` ("value score": "value.score"), each inside `guard`, and
    of those that it is given."""

    class OnDemand(TyperGroup):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.commands: Any = Built(places, guard, self.commands)

        def list_commands(self, ctx: Any) -> list[str]:
            return list(self.commands)

        def get_params(self, ctx: Any) -> list[Any]:
            found: list[Any] = super().get_params(ctx)
            for (
                option
            ) in found:  # for Typer's own flags, which have None, a TAB would load pydantic
                if option.is_flag and option.default is None:
                    option.default = False
            return found

    return OnDemand
