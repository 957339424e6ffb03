"""Times the server under open-loop arrivals: requests come when they come, whatever is at work.

Requests about a few images arrive at random (Poisson) at several rates. For each rate: answers a
second, time to the first token, time a token, at p50, p95 and p99. Contenders, in turn, over the
same weights: this server with and without shared prefixes, and `transformers` behind the same
arrivals, one request after another. Last, all requests come at once, over HTTP and to the engine as
a closed list, in turn: what the engine does is the most that a server can do. Weights are random;
the default takes some minutes on two cores.
"""

import argparse
import asyncio
import concurrent.futures
import contextlib
import dataclasses
import statistics
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeAlias

import httpx
import numpy as np
import torch
from engine import ask_engine, make_prompts
from forward import IMAGE_ID, build, convert_model, make_torch
from options import add_questions, make_parser

from stf_jax.data.tokenizer import IMAGE_TOKEN_ID
from stf_jax.infer.answers import AnswerBuilder
from stf_jax.infer.engine import Engine, batch_sizes, room_for
from stf_jax.infer.prompts import Prompt, bucket
from stf_jax.infer.room import Room
from stf_jax.infer.sampling import GREEDY
from stf_jax.serve.app import Ready, Service
from stf_jax.serve.metrics import Metrics
from stf_jax.serve.schema import Message
from stf_jax.serve.server import ServeConfig, make_server
from stf_jax.serve.worker import Worker
from stf_jax.systems import SYSTEMS

Ask: TypeAlias = Callable[[Prompt], Coroutine[Any, Any, "Timed"]]


@dataclasses.dataclass(frozen=True)
class Timed:
    """When a request came, got its first token and its last, and how many tokens it got."""

    came: float
    first: float
    last: float
    tokens: int


class Ids:
    """Stands for the text of an answer: it ends where the model says."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.finished = False

    def push(self, ids: list[int]) -> str:
        """Takes ids; their text is nobody's concern here."""
        self.token_ids += ids
        return ""

    def finish(self) -> str:
        """Nothing is kept back."""
        return ""


def parse() -> argparse.Namespace:
    """The sizes, the workload and the rates."""
    parser = make_parser(__doc__, layers=4, width=512, mlp_width=1376)
    add_questions(parser, questions=16, new=16)
    parser.add_argument("--repeats", type=int, default=3, help="of all at once")
    parser.add_argument("--system", help="in place of LLaVA-1.5, such as stf with its 144 tokens")
    parser.add_argument("--rates", type=float, nargs="*", default=[2, 4, 8], help="requests/s")
    return parser.parse_args()


def arrivals(count: int, rate: float) -> np.ndarray:
    """Seconds from the start, the same for every contender."""
    return np.cumsum(np.random.default_rng(5).exponential(1 / rate, count))


async def play(ask: Ask, prompts: list[Prompt], rate: float) -> list[Timed]:
    """Sends each prompt at its time, whatever the others do."""
    start = time.perf_counter()

    async def one(prompt: Prompt, at: float) -> Timed:
        await asyncio.sleep(max(start + at - time.perf_counter(), 0))
        return await ask(prompt)

    times = arrivals(len(prompts), rate)
    return await asyncio.gather(*map(one, prompts, times))


async def ask_worker(worker: Worker, new: int, share: bool, prompt: Prompt) -> Timed:
    """Through the thread in which the devices work."""
    if not share:
        prompt = dataclasses.replace(prompt, image_key=None)
    came, first, tokens = time.perf_counter(), None, 0
    builder: AnswerBuilder = Ids()  # type: ignore[assignment]
    async for piece in worker.answer(
        prompt, builder, sampling=GREEDY, most=new, came=time.monotonic()
    ):
        if first is None and piece.usage.new:
            first = time.perf_counter()
        tokens = piece.usage.new
    last = time.perf_counter()
    return Timed(came, first or last, last, tokens)


class Clock:
    """A streamer of `transformers` that notes when the first token comes."""

    def __init__(self) -> None:
        self._calls = 0
        self.first = 0.0

    def put(self, _: torch.Tensor) -> None:
        """First the prompt, then each token."""
        self._calls += 1
        if self._calls == 2:
            self.first = time.perf_counter()

    def end(self) -> None:
        """Nothing more comes."""


class Torch:
    """`transformers`, one request after another in a thread of its own."""

    def __init__(self, model: Any, ends: list[int], new: int):
        self._model, self._ends, self._new = model, ends, new
        self._thread = concurrent.futures.ThreadPoolExecutor(1)

    async def ask(self, prompt: Prompt) -> Timed:
        """Waits for those before it."""
        came = time.perf_counter()
        first, tokens = await asyncio.get_running_loop().run_in_executor(
            self._thread, self._answer, prompt
        )
        return Timed(came, first, time.perf_counter(), tokens)

    def _answer(self, prompt: Prompt) -> tuple[float, int]:
        ids = np.where(prompt.ids == IMAGE_TOKEN_ID, IMAGE_ID, prompt.ids)[None]
        pixels = torch.tensor(prompt.load().transpose(0, 3, 1, 2))
        clock = Clock()
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=torch.tensor(ids, dtype=torch.long),
                attention_mask=torch.ones(ids.shape, dtype=torch.long),
                pixel_values=pixels.to(self._model.dtype),
                do_sample=False,
                max_new_tokens=self._new,
                eos_token_id=self._ends,
                pad_token_id=0,
                streamer=clock,
            )
        return clock.first, out.shape[1] - ids.shape[1]


class Numbered:
    """Stands for what makes prompts of messages: the text is a prompt's number."""

    def __init__(self, prompts: list[Prompt], tokens: int):
        self._prompts, self.budgets = prompts, [tokens]

    def chat(self, messages: list[Message], *, tokens: int | None) -> tuple[Prompt, None]:
        """A prompt, and no template."""
        del tokens
        return self._prompts[int(messages[-1].text)], None


@contextlib.contextmanager
def listening(worker: Worker, prompts: list[Prompt], tokens: int) -> Iterator[str]:
    """The server over this worker; gives the URL of its chat."""
    service = Service(name="model")
    model: Any = SimpleNamespace(make_builder=lambda *_: Ids())
    stub: Any = Numbered(prompts, tokens)
    service.ready = Ready(model=model, prompts=stub, worker=worker)
    server = make_server(service, ServeConfig(name="model", port=0))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while thread.is_alive() and not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.bound_port}/v1/chat/completions"
    finally:
        server.should_exit = True
        thread.join()


async def ask_http(url: str, new: int, count: int) -> int:
    """All at once; how many tokens came."""
    async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=64)) as client:

        async def one(number: int) -> int:
            message = {"role": "user", "content": str(number)}
            body = {"messages": [message], "temperature": 0, "max_tokens": new}
            answer = await client.post(url, json=body)
            answer.raise_for_status()
            return int(answer.json()["usage"]["completion_tokens"])

        return sum(await asyncio.gather(*map(one, range(count))))


def percentiles(values: list[float]) -> str:
    """p50, p95 and p99 in milliseconds."""
    return " ".join(f"{1000 * np.percentile(values, p):7.0f}" for p in (50, 95, 99))


def report(name: str, timed: list[Timed]) -> None:
    """One line."""
    seconds = max(one.last for one in timed) - min(one.came for one in timed)
    waits = [one.first - one.came for one in timed]
    steps = [(one.last - one.first) / max(one.tokens - 1, 1) for one in timed]
    print(f"{name:<34}{len(timed) / seconds:8.2f}  {percentiles(waits)}  {percentiles(steps)}")


def main() -> None:
    """Builds, plays, prints."""
    args = parse()
    torch_model = make_torch(args)
    config, weights = convert_model(torch_model)
    ends = np.random.default_rng(1).choice(np.arange(3, 31000), 3000, replace=False)
    text = dataclasses.replace(config.text, eos_ids=tuple(map(int, ends)))
    config = dataclasses.replace(config, text=text)
    if args.system:
        system = SYSTEMS[args.system].for_model(vision=config.vision, text=config.text)
        config = dataclasses.replace(config, system=system)
    engine = Engine(build(config, weights, args.dtype))
    prompts = make_prompts(args, tokens=config.tokens_per_image, size=config.vision.image_size)
    slots, rows = batch_sizes(args.slots, multiple=1)
    ids = [prompt.ids for prompt in prompts]
    split = config.system.split
    room = Room(
        slots=slots,
        rows=rows,
        contexts=room_for(config, ids, args.new),
        new=bucket(args.new),
        kept=max(rows, args.images),
        prefixes=room_for(config, [one[: split(one).prefilled] for one in ids], 0),
    )
    worker = Worker(engine, room, queue=len(prompts), metrics=Metrics())
    contenders: dict[str, Ask] = {
        f"ours, {slots} slots, no prefix reuse": partial(ask_worker, worker, args.new, False),
        f"ours, {slots} slots, prefix reuse": partial(ask_worker, worker, args.new, True),
    }
    if not args.system:
        # PyTorch has LLaVA-1.5 alone.
        contenders["PyTorch, one at a time"] = Torch(torch_model, ends.tolist(), args.new).ask
    for ask in contenders.values() if args.rates else ():  # To compile.
        asyncio.run(play(ask, prompts[: 2 * slots], 1000))
    print(f"{len(prompts)} requests, {args.images} images, {config.tokens_per_image} tokens each")
    for rate in args.rates:
        print(f"\n{rate:g} requests/s come; ms to the first token, and of each later one:")
        print(f"{'':<34}{'answers/s':>9}{'p50     p95     p99':>24}{'p50     p95     p99':>24}")
        for name, ask in contenders.items():
            report(name, asyncio.run(play(ask, prompts, rate)))
    taken: dict[str, list[tuple[float, float]]] = {"over HTTP": [], "engine, closed list": []}
    with listening(worker, prompts, config.tokens_per_image) as url:
        all_at_once: dict[str, Callable[[], object]] = {
            "over HTTP": lambda: asyncio.run(ask_http(url, args.new, len(prompts))),
            "engine, closed list": partial(ask_engine, engine, args.new, args.slots, True, prompts),
        }
        for again in range(args.repeats + 1):
            for name, run in all_at_once.items():
                start, used = time.perf_counter(), time.process_time()
                run()
                if again:  # The first time compiles.
                    spent = time.perf_counter() - start, time.process_time() - used
                    taken[name].append(spent)
    worker.close()
    print(f"\n{'all at once':<34}{'answers/s':>9}{'seconds of CPU':>24}")
    for name, spents in taken.items():
        wall, cpu = (statistics.median(column) for column in zip(*spents, strict=True))
        print(f"{name:<34}{len(prompts) / wall:9.2f}{cpu:24.2f}")


if __name__ == "__main__":
    main()
