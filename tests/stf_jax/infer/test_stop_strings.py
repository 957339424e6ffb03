"""Stop strings, whatever pieces the text comes in."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stf_jax.infer.stop_strings import StopStrings

# Few letters, so that stop strings occur, overlap and begin without ending.
LETTERS = "ab</"


def up_to_first_stop(text: str, stops: list[str]) -> str:
    """Letter by letter: the first stop string to be complete ends the text where it began."""
    for end in range(len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)]
    return text


@given(
    pieces=st.lists(st.text(LETTERS, max_size=6), max_size=8),
    stops=st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3),
)
@example(pieces=["ab", "a"], stops=["aba", "b"])
@example(pieces=["aba"], stops=["aba", "b"])
@example(pieces=["aaaab"], stops=["aab"])
def test_any_split_gives_the_text_before_the_first_stop(
    pieces: list[str], stops: list[str]
) -> None:
    text, stopping, given_out = "".join(pieces), StopStrings(stops), ""
    expected = up_to_first_stop(text, stops)
    for piece in pieces:
        given_out += stopping.push(piece)
        # Nothing that is given out is ever taken back.
        assert expected.startswith(given_out)
    assert stopping.stopped == (expected != text)
    assert given_out + stopping.finish() == expected


@given(text=st.text(LETTERS, max_size=12), stops=st.lists(st.text(LETTERS, min_size=1, max_size=4)))
def test_no_more_is_kept_back_than_must_be(text: str, stops: list[str]) -> None:
    stopping = StopStrings(stops)
    given_out = "".join(stopping.push(letter) for letter in text)
    kept_back = stopping.finish()
    assert not kept_back or any(stop.startswith(kept_back) for stop in stops)
    if not stopping.stopped:
        assert given_out + kept_back == text


def test_nothing_follows_a_stop() -> None:
    stopping = StopStrings(["</s>"])
    assert stopping.push("one</s>two") == "one"
    assert stopping.stopped
    assert stopping.push("three") == ""
    assert stopping.finish() == ""


def test_empty_stop_string() -> None:
    with pytest.raises(ValueError, match="a stop string is empty"):
        StopStrings(["###", ""])
