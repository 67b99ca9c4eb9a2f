"""Reading what another program says about a model: a mapping from keys to values that may be anything. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from megatron_salt.errors import UserError

LARGEST = 2**31 - 1
"""No size of a model is larger."""


class ConfigReader:
    """Reads a config key by key, refuses what does not fit, and remembers which keys were read. Errors name file, key and value."""

    def __init__(
        self, config: Mapping[str, Any], where: str, *, silent: Collection[str] = (), show: Callable[[Any], str] = repr
    ) -> None:
        """where: names the file. silent: keys that say nothing of the arithmetic, as if they were read. show: a value in messages."""
        self._config, self._where, self._seen, self._show = config, where, set(silent), show

    def refuse(self, key: str, why: str) -> UserError:
        """The error for a key whose value cannot be taken."""
        return UserError(f"{self._where}: {key} is {self._show(self._config.get(key))[:100]}: {why}")

    def in_file(self, error: UserError) -> UserError:
        """The same error, with the name of the file."""
        text = str(error)
        return error if text.startswith(self._where) else UserError(f"{self._where}: {text}")

    def value(self, key: str) -> Any:
        """The value of a key, of any kind; None where there is none."""
        self._seen.add(key)
        return self._config.get(key)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of a key. Raises UserError where it is missing without a default, or of another kind."""
        value = self.value(key)
        if value is None:
            if default is None:
                raise UserError(f"{self._where}: {key} is missing")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise self.refuse(key, f"expected a value of type {kind.__name__}")
        if isinstance(value, int) and kind is int and not 1 <= value <= LARGEST:
            raise self.refuse(key, f"expected a number from 1 to {LARGEST}")
        return value

    def optional(self, key: str, kind: type) -> Any:
        """The value of a key, or None."""
        return None if self.value(key) is None else self.get(key, kind)

    def given(self, key: str) -> bool:
        """Whether the key is there; its value may be null."""
        return key in self._config

    def must_be(self, key: str, *allowed: Any, default: Any) -> Any:
        """The value of a key that may have these values alone."""
        self._seen.add(key)
        value = self._config.get(key, default)
        if value not in allowed:
            raise self.refuse(key, f"this decoder computes only {' or '.join(map(repr, allowed))}")
        return value

    def unread(self) -> list[str]:
        """Keys that nothing has read, with values that say something."""
        return [key for key, value in self._config.items() if key not in self._seen and value not in (None, False, [], {})]
