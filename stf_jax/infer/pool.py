"""The rows of a pool of prefixes: what lies in which, and which makes room."""

from collections import OrderedDict
from collections.abc import Iterable


class PoolRows:
    """Which prefix lies in which row of the pool, and which row may be used again."""

    def __init__(self, count: int):
        # The key of each row, the one used longest ago first.
        self._keys: OrderedDict[int, object] = OrderedDict((row, None) for row in range(count))
        self._at: dict[object, int] = {}
        self._pins = dict.fromkeys(range(count), 0)
        self._filled: set[int] = set()

    @property
    def held(self) -> int:
        """Rows that hold a prefix."""
        return len(self._filled)

    def find(self, key: object) -> int | None:
        """The row of a key, if it has one."""
        return self._at.get(key)

    def filled(self, row: int) -> bool:
        """Whether the row holds its prefix already."""
        return row in self._filled

    def fill(self, row: int) -> None:
        """Its prefix is there."""
        self._filled.add(row)

    def take(self, key: object, *, besides: Iterable[int]) -> int | None:
        """The row that was used longest ago, for this key; None if all are in use."""
        busy = {*besides}
        for row in self._keys:
            if not self._pins[row] and row not in busy:
                self.forget(row)
                self._keys[row], self._at[key] = key, row
                self._keys.move_to_end(row)
                return row
        return None

    def forget(self, row: int) -> None:
        """Empties a row."""
        self._at.pop(self._keys[row], None)
        self._keys[row] = None
        self._pins[row] = 0
        self._filled.discard(row)

    def pin(self, row: int) -> None:
        """A request waits for this row."""
        self._pins[row] += 1
        self._keys.move_to_end(row)

    def unpin(self, row: int) -> None:
        """One request less waits for it. What no other can use makes room first."""
        self._pins[row] -= 1
        if not self._pins[row] and isinstance(self._keys[row], int):
            self.forget(row)
            self._keys.move_to_end(row, last=False)
