"""The forms in which other tools write a conversation, as LLaVA's own.

LLaVA's:
    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image> What?"}, ...]}
TRL's:
    {"images": ["a.jpg"], "messages": [{"role": "user", "content": [{"type": "image"}, ...]}]}

LLaMA-Factory has `images` and either of the two lists. What comes back is LLaVA's list of turns,
with a turn from "system" in front where there is one, and the names of the images.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stf_jax.data.templates import IMAGE_MARKER

TURN_KEYS = ("conversations", "messages", "conversation")
IMAGE_KEYS = ("image", "images", "image_path", "image_paths", "image_file", "image_files")
CLIP_KEYS = ("video", "videos")
OTHER_MEDIA = ("audio", "audios")

_SENDERS = {
    "human": "human", "user": "human",
    "gpt": "gpt", "assistant": "gpt", "model": "gpt",
    "system": "system",
}  # fmt: skip
# What a content part calls its image.
_PART_KEYS = ("image", "image_url", "url", "path", "file")
_LONGEST = 200


class FormError(ValueError):
    """An entry whose form is not known; one line that says what is wrong."""


def read_form(content: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """The turns and the image names of an entry.

    Raises:
      FormError: it is none of the forms above, or names what is not read (a sound).
    """
    if not isinstance(content, Mapping):
        raise FormError(f"a {type(content).__name__}, not an object")
    for key in OTHER_MEDIA:
        if content.get(key):
            raise FormError(f"{key!r} is not read, only images and videos are; drop the example")
    named = _read_names(content, IMAGE_KEYS)
    turns = _read_turns(content)
    plain, inside = [], []
    for turn in turns:
        sender = turn["from"] if "from" in turn else turn.get("role")
        value = turn["value"] if "value" in turn else turn.get("content")
        if isinstance(value, list):
            value, names = _join_parts(value)
            inside += names
        known = _SENDERS.get(sender, sender) if isinstance(sender, str) else sender
        plain.append({"from": known, "value": value})
    # A part names its own image, or leaves that to the entry's list.
    written = [name for name in inside if name is not None]
    if written and named and named != written:
        raise FormError("images are named in the turns and beside them; leave out one of the two")
    return plain, named or written


def read_clips(content: Any) -> list[str]:
    """The names of an entry's videos, each a file or a folder of frames.

    Raises:
      FormError: a name that is none.
    """
    return _read_names(content, CLIP_KEYS) if isinstance(content, Mapping) else []


def shorten(text: str) -> str:
    """`text` as a message can show it: one line of readable length, with both ends of a path."""
    text = text.replace("\n", " ")
    if len(text) <= _LONGEST:
        return text
    end = _LONGEST // 4
    return f"{text[:end]}...{text[-end:]} ({len(text)} characters)"


def _read_turns(content: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    key = next((key for key in TURN_KEYS if key in content), None)
    turns = None if key is None else content[key]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        others = "" if key else f", and there are {shorten(', '.join(map(str, content)))}"
        raise FormError(
            f"{key or 'conversations'!r} must be a list of objects{others}; write LLaVA's form, "
            '{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}'
        )
    return turns


def _read_names(content: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    names: dict[str, list[str]] = {}
    for key in keys:
        value = content.get(key)
        items = [] if value is None else value if isinstance(value, list) else [value]
        if items:
            names[key] = [_read_name(item, key) for item in items]
    lists = list(names.values())
    if any(list_ != lists[0] for list_ in lists):
        raise FormError(f"{' and '.join(names)} name different files; leave out one of them")
    return lists[0] if lists else []


def _read_name(item: Any, key: str) -> str:
    if isinstance(item, Mapping):
        path = next((item[part] for part in _PART_KEYS if item.get(part)), None)
        if path is None and item.get("bytes"):
            raise FormError(
                f"{key!r} holds an image's bytes; write them to a file, and its path here"
            )
        item = path
    if item == "":
        raise FormError(f"{key!r} has an empty name; leave the key out where there is no image")
    if not isinstance(item, str):
        raise FormError(f"{key!r} is {shorten(repr(item))}; it must be a path or a list of paths")
    return item


def _join_parts(parts: Sequence[Any]) -> tuple[str, list[str | None]]:
    """The text of a turn that is written in parts, and a name or None for each image in it."""
    texts, names = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, str) or kind == "text":
            text = part if isinstance(part, str) else part.get("text")
            if not isinstance(text, str):
                raise FormError(f"a part of type 'text' holds {shorten(repr(text))}; write a text")
            texts.append(text)
        elif kind in ("image", "image_url", "input_image"):
            value = next((part[key] for key in _PART_KEYS if part.get(key)), None)
            names.append(None if value is None else _read_name(value, str(kind)))
            texts.append(IMAGE_MARKER)
        else:
            raise FormError(
                f"a part of type {shorten(repr(kind))} is not read, only text and images are"
            )
    return "\n".join(texts), names


def find_markers(turns: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, str, bool]]:
    """Where a text has the marker of an image or a video: (turn from 1, marker, asks for it).

    It asks for what it marks if it stands where the recipe puts it, at the beginning or end of a
    question or on a line alone. Anywhere else it may be a word, as in a web page.
    """
    for number, turn in enumerate(turns, start=1):
        for marker in (IMAGE_MARKER, "<video>", "<audio>"):
            text = turn["value"].strip()
            if marker in text:
                lines = [line.strip() for line in text.splitlines()]
                placed = text.startswith(marker) or text.endswith(marker) or marker in lines
                yield number, marker, placed and turn["from"] == "human"
