"""Whether a template fits a tokenizer, and where a reply ends for the two together.

A model stops only where it has learned to: every reply that it is trained on must end in a token at
which generation stops. A template whose end of text is no token of the tokenizer would be learned
as ordinary characters, and the model would talk on.
"""

from dataclasses import replace

from stf_jax.data.templates import (
    BEGIN,
    END,
    IMAGE_MARKER,
    TEMPLATES,
    ImagesFirst,
    LabelRule,
    Template,
    get_template,
)
from stf_jax.data.tokenizer import Tokenizer


def fit_template(name: str, tokenizer: Tokenizer) -> Template:
    """The template of that name as a tokenizer spells it.

    `<s>` and `</s>` become the tokenizer's own beginning and end of text, and an image gets the
    tokens round it, or the place in front of the conversation, that the model was trained with.
    `v0` and `plain` end a reply in text, at which generation stops too.

    Raises:
      ValueError: an unknown template, or one with special tokens that this tokenizer does not have;
        names those that fit.
    """
    template = get_template(name)
    if problem := _misfit(template, tokenizer):
        fitting = [other for other in TEMPLATES if not _misfit(get_template(other), tokenizer)]
        raise ValueError(
            f"template {name!r} {problem}, so that no model would learn where a reply ends; "
            f"choose one of {', '.join(sorted(fitting))}"
        )
    return _spell(template, tokenizer)


def stop_ids(template: Template, tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end a reply: the tokenizer's own end of text, and the template's.

    Args:
      template: from `fit_template`.
      tokenizer: the same.
    """
    return frozenset({tokenizer.eos_id, *_last_token(template, tokenizer)})


def _spell(template: Template, tokenizer: Tokenizer) -> Template:
    def spell(token: int | None) -> str:
        return "" if token is None else tokenizer.backend.id_to_token(token) or ""

    marker = template.image_marker.replace(IMAGE_MARKER, tokenizer.image_marker)
    template = _put_images_first(replace(template, image_marker=marker), tokenizer.images_first)
    training = template.training
    return replace(
        template,
        training=training
        and _put_images_first(replace(training, image_marker=marker), tokenizer.images_first),
        reply_end=template.reply_end.replace(END, spell(tokenizer.eos_id)),
        before_question=template.before_question.replace(BEGIN, spell(tokenizer.bos_id)),
    )


def _put_images_first(template: Template, first: ImagesFirst | None) -> Template:
    if first is None:
        return template
    system = template.system.replace(first.behind, first.behind + first.inserted, 1)
    reply = template.opening_to_reply
    return replace(
        template,
        system=system,
        opening=template.opening.replace(template.system, system),
        opening_to_reply=reply and reply.replace(template.system, system),
        # The code that has images first has no other.
        label_rule=template.label_rule if template.label_rule is LabelRule.V1 else None,
        images_first=first,
    )


def _misfit(template: Template, tokenizer: Tokenizer) -> str | None:
    missing = [marker for marker in template.markers if not tokenizer.is_special(marker)]
    if missing:
        return f"needs {', '.join(missing)}, of which this tokenizer makes ordinary text"
    spelled = _spell(template, tokenizer)
    if not (spelled.stop_strings or _last_token(spelled, tokenizer)):
        return f"ends a reply in {spelled.reply_end!r}, which is no special token of this tokenizer"
    return None


def _last_token(template: Template, tokenizer: Tokenizer) -> set[int]:
    """The special token in which a reply ends; empty where it ends in text."""
    return {*tokenizer.encode(f"a{template.reply_end}")[-1:]} & tokenizer.special_ids
