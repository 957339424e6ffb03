"""The metrics of each step: `metrics.jsonl`, TensorBoard, and a line on the terminal."""

import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stf_jax.store.run import METRICS, TENSORBOARD
from stf_jax.train.validation import HeldOutLoss
from stf_jax.util.files import check_file, decode_text, explain_file, parse_json, write_text

_LONGEST_LINE = 2**16


def import_summary_writer() -> Any:
    """The class of tensorboardX, which imports PyTorch where it finds it: seconds for nothing."""
    modules: dict[str, Any] = sys.modules
    hides = "torch" not in modules
    if hides:
        modules["torch"] = None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hides:
            del modules["torch"]
    return SummaryWriter


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One line of `metrics.jsonl`.

    Attributes:
        step: number, from 0.
        loss: before the step, in nats.
        grad_norm: before clipping.
        learning_rate: of the language model, or of what is trained without it.
        supervised_tokens: of the batch.
        fill: the part of the batch's positions that holds tokens.
        seconds: since the step before was done.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    supervised_tokens: int
    fill: float
    seconds: float

    @property
    def is_finite(self) -> bool:
        """Whether the step changed anything; see `make_step`."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class MetricsLog:
    """Writes the records of a run; steps from `start` on that are there already are taken out.

    Args:
        path: of the run.
        start: the first step that will be written.
        stop: one after the last.
        every: steps between lines where the output is no terminal.
        flops: of one step, on one device.
        writes: false on all hosts but one, where nothing is written or shown.
    """

    def __init__(
        self, path: epath.PathLike, *, start: int, stop: int, every: int, flops: float, writes: bool
    ):
        self._writes = writes
        self._stop, self._every, self._flops = stop, every, flops
        self._path = epath.Path(path) / METRICS
        self._local = "://" not in os.fspath(path)
        self._lines: list[str] = []
        self._file: Any = None
        self._board: Any = None
        self._progress: Progress | None = None
        self._task: Any = None
        if not writes:
            return
        self._lines = _lines_before(self._path, start)
        self.flush()
        if self._local:
            self._file = Path(self._path).open("a", encoding="utf-8")  # noqa: SIM115
            self._board = import_summary_writer()(
                os.fspath(epath.Path(path) / TENSORBOARD), purge_step=start or None
            )
        console = Console(stderr=True)
        if console.is_terminal:
            self._progress = Progress(
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                TimeRemainingColumn(compact=True),
                console=console,
            )
            self._task = self._progress.add_task("", total=stop, completed=start)
            self._progress.start()

    def write(self, record: StepRecord) -> None:
        """Records a step; a kill right after it loses nothing of it on a local disk."""
        if not self._writes:
            return
        values = dataclasses.asdict(record)
        # JSON has no word for what is not finite.
        self._append({k: v if math.isfinite(v) else None for k, v in values.items()})
        if self._board is not None:
            for name in ("loss", "grad_norm", "learning_rate", "supervised_tokens", "fill"):
                if math.isfinite(values[name]):
                    self._board.add_scalar(f"train/{name}", values[name], record.step)
        self._show(record)

    def write_validation(self, step: int, result: HeldOutLoss) -> None:
        """Records the loss of held-out examples before a step, as that of the step's own is."""
        if not self._writes:
            return
        loss = result.loss if math.isfinite(result.loss) else None
        self._append({"step": step, "validation_loss": loss, "validation_tokens": result.tokens})
        if self._board is not None and loss is not None:
            self._board.add_scalar("validation/loss", loss, step)
        text = f"step {step}/{self._stop}  validation {result}"
        if self._progress is not None:
            self._progress.console.print(text, highlight=False)
        else:
            sys.stderr.write(f"{text}\n")

    def _append(self, values: dict[str, Any]) -> None:
        line = json.dumps(values) + "\n"
        if self._file is None:
            self._lines.append(line)
        else:
            self._file.write(line)
            self._file.flush()

    def flush(self) -> None:
        """Brings the file up to date where it cannot be appended to, as on gs://."""
        if self._writes and self._file is None:
            write_text(self._path, "".join(self._lines))

    def close(self) -> None:
        """Ends the progress bar and closes the files."""
        if self._progress is not None:
            self._progress.stop()
        if self._file is not None:
            self._file.close()
        elif self._writes:
            self.flush()
        if self._board is not None:
            self._board.close()

    def _show(self, record: StepRecord) -> None:
        seconds = max(record.seconds, 1e-9)
        text = (
            f"loss {record.loss:.4f}  lr {record.learning_rate:.2e}  "
            f"{record.supervised_tokens / seconds:,.0f} supervised tokens/s  "
            f"{100 * record.fill:.1f} % full  {self._flops / seconds / 1e12:.3g} TFLOP/s a device"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=record.step + 1, description=text)
        elif (record.step + 1) % self._every == 0 or record.step + 1 == self._stop:
            remaining = (self._stop - record.step - 1) * seconds
            sys.stderr.write(
                f"step {record.step + 1}/{self._stop}  {text}  "
                f"{time.strftime('%H:%M:%S', time.gmtime(remaining))} left\n"
            )


def _lines_before(path: epath.Path, start: int) -> list[str]:
    """The lines of earlier steps, up to one that a kill has cut, or that is too long for one."""
    if not path.exists():
        return []
    lines, damaged = [], 0
    with explain_file(path, fix="move it away"):
        check_file(path)
        with path.open("rb") as file:
            while (line := file.readline(_LONGEST_LINE)).endswith(b"\n"):
                try:
                    text = decode_text(line)
                    if parse_json(text)["step"] < start:
                        lines.append(text)
                except (ValueError, KeyError, TypeError):
                    damaged += 1
    if damaged:
        sys.stderr.write(f"{path}: {damaged} lines are damaged and are left out\n")
    return lines
