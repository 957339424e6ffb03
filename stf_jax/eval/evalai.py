"""How EvalAI's VQA evaluation writes an answer before it compares, bug for bug.

VQAv2 and VizWiz are submitted in this form, and TextVQA is scored in it. The oddities are part of
the metric: scores are comparable only if every one is kept.
"""

import re

# In the order of the metric; a comma or a question mark has gone before they come into play.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'

# The metric hands a flag to re.sub where the number of replacements belongs, and that is its value.
_PERIODS = 32
_PERIOD = re.compile(r"\.(?!\d)")

_NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_ARTICLES = ("a", "an", "the")

_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# Each is restored where one of its apostrophes is missing; a single word goes the other way.
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word
    for word in _CONTRACTED.split()
    for at, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}


def normalize_answer(text: str) -> str:
    """The form in which EvalAI compares an answer: "Two dogs." is "2 dogs"."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_space else " ")
    cleaned = _PERIOD.sub("", cleaned, count=_PERIODS)
    words = [_NUMBERS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
