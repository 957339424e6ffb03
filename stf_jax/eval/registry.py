"""The nine benchmarks by name, in the order of the paper's table; and those about clips."""

from stf_jax.eval.benchmark import Benchmark
from stf_jax.eval.gqa import GQA
from stf_jax.eval.mmbench import MMBENCH, MMBENCH_CN
from stf_jax.eval.mme import MME
from stf_jax.eval.nextqa import NEXTQA
from stf_jax.eval.pope import POPE
from stf_jax.eval.scienceqa import SCIENCEQA
from stf_jax.eval.textvqa import TEXTVQA
from stf_jax.eval.vizwiz import VIZWIZ
from stf_jax.eval.vqav2 import VQAV2

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (VQAV2, GQA, VIZWIZ, SCIENCEQA, TEXTVQA, POPE, MME, MMBENCH, MMBENCH_CN)
}

# Not among `all`, which is the paper's table.
CLIP_BENCHMARKS = {benchmark.name: benchmark for benchmark in (NEXTQA,)}


def get_benchmark(name: str) -> Benchmark:
    """The benchmark called `name`; ValueError listing the names if there is none."""
    known = {**BENCHMARKS, **CLIP_BENCHMARKS}
    if name not in known:
        raise ValueError(
            f"unknown benchmark {name!r}: choose one of {', '.join(known)}; or all, which means "
            "those about images"
        )
    return known[name]
