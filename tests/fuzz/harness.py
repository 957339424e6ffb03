"""Runs cases: each works, or is refused as a user is told of it, in bounded time and memory."""

import dataclasses
import faulthandler
import gc
import random
import resource
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from stf_jax.cli.main import _explain

SECONDS = 5
GROWTH = 2**30  # bytes
_PATIENCE = 4  # with a machine on which much else goes on
_LONGEST_LINE = 2000
_LEFTOVERS = ("*.unfinished", "*.tmp-*")


class Hang(BaseException):
    """A case took too long."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What is attacked.

    Attributes:
      name: of the verb or file.
      prepare: fills a folder that all cases share.
      run: (base, folder, random numbers, told) makes one case of it in another folder, and does
        what a user would; tells what it damages, and returns what a report finds wrong.
      cases: of a run of the tests.
      all_or_nothing: what must not be there when a case is refused.
    """

    name: str
    prepare: Callable[[Path], None]
    run: Callable[[Path, Path, random.Random, list[str]], str | None]
    cases: int
    all_or_nothing: tuple[str, ...] = ()


@dataclasses.dataclass(kw_only=True)
class Tally:
    """What came of a target's cases."""

    works: int = 0
    refused: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)
    slowest: float = 0.0
    growth: int = 0
    messages: Counter[str] = dataclasses.field(default_factory=Counter)


def attack(
    target: Target, folder: Path, *, cases: range, seed: int = 0, alone: bool = False
) -> Tally:
    """Runs cases by their number, each of which depends on the seed and the number alone.

    Args:
      target: what is attacked.
      folder: for its files; it must not be there.
      cases: their numbers.
      seed: of the random numbers.
      alone: this process does nothing else, so that a case may be interrupted wherever it is, and
        time is a matter of the case alone.
    """
    base = folder / "base"
    base.mkdir(parents=True)
    target.prepare(base)
    tally = Tally()
    gc.collect()
    begun = _peak()
    for number in cases:
        rng = random.Random(f"{seed} {target.name} {number}")
        place = folder / "case"
        place.mkdir()
        told: list[str] = []
        start, before = time.perf_counter(), _peak()
        try:
            with _no_longer_than(SECONDS, interrupt=alone):
                found = target.run(base, place, rng, told)
            tally.works += found is None
            tally.refused += found is not None
            tally.messages[str(found).partition("\n")[0]] += found is not None
        except Hang:
            _fail(tally, target, number, told, f"more than {SECONDS} s")
        except Exception as error:  # noqa: BLE001
            refusal = _explain(error)
            tally.refused += refusal is not None
            if refusal is not None:
                tally.messages[refusal.partition("\n")[0]] += 1
            _judge(tally, target, number, told, error, refusal, place)
        except BaseException as error:
            # A panic of a library in Rust.
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            _fail(tally, target, number, told, traceback.format_exc())
        if leftovers := [path.name for name in _LEFTOVERS for path in place.rglob(name)]:
            _fail(tally, target, number, told, f"left behind: {leftovers}")
        taken = time.perf_counter() - start
        tally.slowest = max(tally.slowest, taken)
        if taken > _PATIENCE * SECONDS:
            _fail(tally, target, number, told, f"{taken:.0f} s")
        if _peak() - before > GROWTH:
            _fail(tally, target, number, told, f"{(_peak() - before) >> 20} MiB more memory")
        shutil.rmtree(place, ignore_errors=True)
    tally.growth = _peak() - begun
    return tally


def _judge(
    tally: Tally,
    target: Target,
    number: int,
    told: list[str],
    error: Exception,
    refusal: str | None,
    place: Path,
) -> None:
    if refusal is None:
        text = "".join(traceback.format_exception(error)[-12:])
        _fail(tally, target, number, told, f"a traceback:\n{text}")
    elif not refusal.strip() or max(map(len, refusal.split("\n"))) > _LONGEST_LINE:
        _fail(tally, target, number, told, f"a message of no use: {refusal[:300]!r}")
    if there := [name for name in target.all_or_nothing if (place / name).exists()]:
        _fail(tally, target, number, told, f"refused, and there: {there}")


def _fail(tally: Tally, target: Target, number: int, told: list[str], what: str) -> None:
    tally.failures.append(f"{target.name}, case {number} ({'; '.join(told)}): {what}")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _no_longer_than:
    def __init__(self, seconds: float, *, interrupt: bool):
        self._seconds, self._interrupt = seconds, interrupt

    def __enter__(self) -> None:
        def hang(number: int, frame: object) -> None:
            raise Hang

        # What waits inside a library is not reached by a signal; it ends the run, and says where.
        faulthandler.dump_traceback_later(20 * self._seconds, exit=True)
        self._old = signal.signal(signal.SIGALRM, hang)
        signal.setitimer(signal.ITIMER_REAL, self._seconds if self._interrupt else 0)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, self._old)


def numbered(folder: Path) -> Iterator[Path]:
    """Every file of a folder, in order."""
    yield from sorted(path for path in folder.rglob("*") if path.is_file())
