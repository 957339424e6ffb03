"""Stop strings: text that ends an answer, wherever token boundaries fall."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on, and keeps back an end that may become a stop string.

    The first stop string to be complete ends the text where that string began; of several that end
    together, the longest. What pieces the text comes in makes no difference.
    """

    def __init__(self, stops: Sequence[str]):
        if "" in stops:
            raise ValueError("a stop string is empty; every answer would end before it began")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Takes text; returns the part that certainly stands before any stop string."""
        if self.stopped:
            return ""
        held = self._held + text
        # Where each stop string first ends and begins.
        hits = [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]
        if hits:
            self.stopped, self._held = True, ""
            return held[: min(hits)[1]]
        # The longest end of the text that some stop string begins with.
        keep = max(
            (
                n
                for stop in self._stops
                for n in range(1, min(len(stop) - 1, len(held)) + 1)
                if held.endswith(stop[:n])
            ),
            default=0,
        )
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """The text that was kept back, at the end of the answer."""
        held, self._held = self._held, ""
        return held
