"""Requests in the form in which other programs send them."""

import base64

from tests.stf_jax.serve.conftest import Running, png


def test_the_form_of_lmms_eval(serving: Running) -> None:
    """Its `openai_compatible`: text before the images, in PNG; a limit of completion tokens."""
    images = [png((200, 30, 30)), png((20, 40, 220))]
    parts = [
        {
            "type": "image_url",
            "image_url": {"url": f"data:image/png;base64,{base64.b64encode(image).decode()}"},
        }
        for image in images
    ]
    content = [{"type": "text", "text": "What differs?\nAnswer with a word."}, *parts]
    answer = serving.client().chat.completions.create(
        messages=[{"role": "user", "content": content}],
        model="tiny",
        max_completion_tokens=16,
        temperature=0,
    )
    assert answer.choices[0].message.content
    details = answer.usage.prompt_tokens_details
    assert details.image_tokens == 2 * serving.model.config.tokens_per_image
