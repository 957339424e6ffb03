"""The verb `stf-jax chat`."""

import argparse
import io
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from stf_jax.cli.verbs import (
    FLOATS,
    Verbs,
    add_allow_urls,
    add_model_options,
    add_verb,
    check_output,
    path,
    read_fields,
)

if TYPE_CHECKING:
    from stf_jax.infer.chat import Chat

_HELP = """\
/image FILE   show an image; it goes with the next question
/restart      forget everything
/save FILE    write the conversation as JSON, in the form of LLaVA's training files
/quit         leave (or end of input)
Ctrl-C ends an answer."""


def add_chat(verbs: Verbs) -> None:
    """Adds `chat`."""
    parser = add_verb(verbs, "chat", _chat, "talk with a model about images")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"In the conversation:\n{_HELP}"
    parser.add_argument("model", metavar="MODEL", type=path, help="as for generate")
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        type=path,
        help="an image for the first question; may be given several times",
    )
    add_allow_urls(parser)
    parser.add_argument("--template", default="v1", metavar="NAME", help="(v1)")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="(512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="(1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    parser.add_argument("--dtype", choices=FLOATS, help="(float32 on CPU, else bfloat16)")
    add_model_options(parser)


def _chat(options: argparse.Namespace) -> None:
    from stf_jax.infer.chat import Chat
    from stf_jax.infer.load import load
    from stf_jax.infer.sampling import Sampling

    check_output()
    sampling = Sampling(temperature=options.temperature, top_p=options.top_p, seed=options.seed)
    model = load(
        options.model,
        dtype=options.dtype,
        vision_tower=options.vision_tower,
        system=options.system,
        fields=read_fields(options.field),
    )
    chat = Chat(
        model,
        template=options.template,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        allow_urls=options.allow_urls,
        tokens=options.tokens,
    )
    for image in options.image:
        chat.show(image)
    if isinstance(sys.stdin, io.TextIOWrapper):
        # A line that is no UTF-8 is no reason to lose the conversation either.
        sys.stdin.reconfigure(errors="surrogateescape")
    sys.stderr.write("Ask, or /help.\n")
    while (line := _read()) is not None:
        try:
            if any("\ud800" <= character <= "\udfff" for character in line):
                raise ValueError("this line is not UTF-8; write it again, or convert what is piped")
            if line.startswith("/"):
                if not _command(chat, line):
                    return
            elif line.strip():
                _answer(chat, line)
        except (OSError, ValueError) as error:
            # A mistake is no reason to lose the conversation.
            sys.stderr.write(f"error: {error}\n")


def _read() -> str | None:
    """The next line; None at the end of the input. The prompt is for people."""
    if sys.stdin.isatty():
        try:
            return input("> ")
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _answer(chat: "Chat", question: str) -> None:
    answer = chat.ask(question)
    try:
        for text in answer:
            sys.stdout.write(text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        answer.close()
    sys.stdout.write("\n")
    sys.stdout.flush()


def _command(chat: "Chat", line: str) -> bool:
    """Runs a command of the chat; returns False if the chat ends."""
    try:
        name, *arguments = shlex.split(line)
    except ValueError:
        raise ValueError(f'{line!r} has a quote that does not end; write "it\'s.png"') from None
    match name, arguments:
        case "/image", [name_of_file]:
            chat.show(path(name_of_file))
        case "/restart", []:
            chat.restart()
        case "/save", [name_of_file]:
            text = json.dumps(chat.to_json(), indent=2, ensure_ascii=False)
            Path(path(name_of_file)).write_text(f"{text}\n", encoding="utf-8")
        case "/quit", []:
            return False
        case "/help", []:
            sys.stderr.write(f"{_HELP}\n")
        case "/image" | "/save", _:
            raise ValueError(f"{name} takes one FILE, in quotes if there is a space in its name")
        case "/restart" | "/quit" | "/help", _:
            raise ValueError(f"{name} takes nothing behind it")
        case _:
            raise ValueError(f"{line!r} is no command; /help lists them")
    return True
