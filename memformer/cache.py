"""Keys and values that need computing only once."""

from __future__ import annotations

from torch import Tensor


class KeyValueCache:
    """Keys and values that were computed already, `(B, H, n, d)` each, at most `length`.

    For reading without gradients: it writes in place, and never holds more than a segment.
    """

    def __init__(self, length: int) -> None:
        self.length, self.filled = length, 0
        self.store: Tensor | None = None
        self.parts: tuple[Tensor, ...] = ()  # of the store: keys, values

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add `(B, H, n, d)` twice; returns all that is held. `ValueError` without room."""
        begin, end = self.filled, self.filled + key.shape[2]
        if end > self.length:
            raise ValueError(f"{end} positions, but the cache has room for {self.length}")
        if self.store is None:
            self.store = key.new_empty(2, *key.shape[:2], self.length, key.shape[-1])
            self.parts = self.store.unbind()
        for part, new in zip(self.parts, (key, value), strict=True):
            part[:, :, begin:end] = new
        self.filled = end
        return self.held()

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values, `(B, H, filled, d)` each; `ValueError` where nothing is held."""
        if self.store is None:
            raise ValueError("the cache is empty; extend it first")
        key, value = self.parts
        return key.narrow(2, 0, self.filled), value.narrow(2, 0, self.filled)

    def clear(self) -> None:
        """Forget everything; the room stays."""
        self.filled = 0
