"""Sampling: the drawn tokens follow the softmax, and the settings are checked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from stf_jax.infer.sampling import Sampling, likely, sample

# Every draw is reproducible, so a test that passes once passes always.
DRAWS = 20000
LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -9.0, 1.5], np.float32)


def draw(logits: np.ndarray, *, seeds: np.ndarray, steps: np.ndarray, **knobs: float) -> np.ndarray:
    """One token for each pair of seed and step."""
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | knobs

    def one(seed: jax.Array, step: jax.Array) -> jax.Array:
        return sample(
            jnp.asarray(logits)[None],
            step=step[None],
            seed=seed[None],
            temperature=jnp.full(1, settings["temperature"], jnp.float32),
            top_k=jnp.full(1, settings["top_k"], jnp.int32),
            top_p=jnp.full(1, settings["top_p"], jnp.float32),
        )[0]

    return np.asarray(jax.jit(jax.vmap(one))(seeds.astype(np.uint32), steps.astype(np.int32)))


MANY, ZEROS = np.arange(DRAWS), np.zeros(DRAWS, int)


@pytest.mark.parametrize(
    ("seeds", "steps"), [(MANY, ZEROS), (ZEROS + 7, MANY)], ids=["seeds", "steps"]
)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies(seeds: np.ndarray, steps: np.ndarray, temperature: float) -> None:
    tokens = draw(LOGITS, seeds=seeds, steps=steps, temperature=temperature)
    chances = np.asarray(jax.nn.softmax(LOGITS.astype(np.float64) / temperature), np.float64)
    actual = np.bincount(tokens, minlength=len(LOGITS))
    # The rare one is counted with its neighbor: chi-square wants no tiny expectations.
    actual, chances = (np.concatenate([x[:5], [x[5] + x[6]], x[7:]]) for x in (actual, chances))
    expected = chances / chances.sum() * DRAWS
    assert scipy.stats.chisquare(actual, expected).pvalue > 0.01


@pytest.mark.parametrize("temperature", [1e-20, 1e-38, 1e-50])
def test_next_to_greedy(temperature: float) -> None:
    """Where a logit over the temperature is beyond float32, and where the temperature is below."""
    tokens = draw(LOGITS * 10, seeds=MANY[:100], steps=ZEROS[:100], temperature=temperature)
    assert (tokens == 0).all()


def test_truncated_frequencies() -> None:
    """Of 0.4, 0.3, 0.2, 0.1: top-k 3 leaves 4/9, 3/9, 2/9, of which top-p 0.7 leaves two."""
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    tokens = draw(logits, seeds=MANY, steps=ZEROS, top_k=3, top_p=0.7)
    actual = np.bincount(tokens, minlength=4)
    assert actual[0] == actual[2] == 0
    expected = np.array([4, 3]) / 7 * DRAWS
    assert scipy.stats.chisquare(actual[[1, 3]], expected).pvalue > 0.01


def test_steps_are_independent() -> None:
    tokens = draw(np.zeros(4, np.float32), seeds=ZEROS + 3, steps=MANY).reshape(-1, 2)
    pairs = np.bincount(tokens[:, 0] * 4 + tokens[:, 1], minlength=16)
    assert scipy.stats.chisquare(pairs).pvalue > 0.01


def kept(logits: np.ndarray, *, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    rows = jnp.atleast_2d(logits)
    knobs = {
        "top_k": jnp.full(len(rows), top_k, jnp.int32),
        "top_p": jnp.full(len(rows), top_p, jnp.float32),
    }
    cut = likely(rows, **knobs).reshape(logits.shape)
    survivors = np.isfinite(cut)
    np.testing.assert_array_equal(np.asarray(cut)[survivors], logits[survivors])
    return survivors


def test_top_p_of_one_keeps_all() -> None:
    """Though in float32 the cumulated chances of a long tail reach one before its end."""
    logits = np.random.default_rng(0).normal(0, 4, (3, 32000)).astype(np.float32)
    assert kept(logits).all()


def test_at_least_one_is_kept() -> None:
    logits = np.array([[0.0, 3.0, 1.0], [5.0, 5.0, 5.0]], np.float32)
    np.testing.assert_array_equal(kept(logits, top_p=1e-9).sum(1), [1, 1])
    np.testing.assert_array_equal(kept(logits, top_k=1).sum(1), [1, 1])
    assert kept(logits, top_k=1)[0].argmax() == 1
    assert kept(logits, top_k=99).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; give 0"),
        ({"temperature": float("nan")}, "temperature is nan; give 0"),
        ({"temperature": float("inf")}, "temperature is inf; give 0"),
        ({"seed": -1}, "seed is -1; give 0 to 4294967295"),
        ({"seed": 2**32}, "seed is 4294967296; give 0 to 4294967295"),
        ({"top_p": 0.0}, "top_p is 0.0; give more than 0"),
        ({"top_p": 1.5}, "top_p is 1.5; give more than 0 and at most 1"),
        ({"top_k": -1}, "top_k is -1; give 0"),
    ],
)
def test_bad_settings(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)
