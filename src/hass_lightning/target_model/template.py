"""Chat templates: a Jinja file instead of the tokenizer's own template, and the options that a template reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hass_lightning.target_model.source import local_path

GENERATION_TAG = r"\{%-?\s*(?:end)?generation\s*-?%\}"  # transformers' tag around answers
GIVEN = ("messages", "tools", "documents", "add_generation_prompt")  # variables set for each conversation


def read_template(path: str) -> str:
    """Read a Jinja chat template from a file.

    Raises:
        ValueError: the file does not exist or is not a Jinja template.
    """
    from jinja2 import TemplateSyntaxError

    file = local_path(path)
    if not file.is_file():
        raise ValueError(
            f"target.chat_template={path} does not exist: set it to a Jinja file, or to null for the tokenizer's own."
        )
    try:
        text = file.read_text(encoding="utf-8")
        _parse(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"target.chat_template={path} is not UTF-8 ({error}): convert it.") from error
    except TemplateSyntaxError as error:
        raise ValueError(
            f"target.chat_template={path} is not a Jinja template: {error} (line {error.lineno})."
        ) from error
    return text


def _parse(text: str) -> Any:
    from jinja2 import Environment

    environment = Environment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"])
    return environment.parse(re.sub(GENERATION_TAG, "", text))


def with_options(template: str | None, options: Mapping[str, Any]) -> str:
    """Return the template with variables set to the values of `target.chat_template_options`, such as enable_thinking.

    The values are written into the template, so everything that is rendered with it or named after it depends on them.

    Raises:
        ValueError: there is no template, or it does not read one of the options.
    """
    from jinja2 import TemplateSyntaxError, meta

    if not isinstance(options, Mapping):
        raise ValueError(
            f"target.chat_template_options={options} cannot be used: give a mapping like {{enable_thinking: false}}."
        )
    if template is None:
        raise ValueError(
            f"target.chat_template_options={dict(options)} needs a chat template, and the tokenizer has none: set "
            "target.chat_template to a Jinja file."
        )
    try:
        read = sorted(meta.find_undeclared_variables(_parse(template)) - set(GIVEN))
    except TemplateSyntaxError as error:
        raise ValueError(f"the tokenizer's chat template is no Jinja ({error}): set target.chat_template.") from error
    for name in options:
        if name not in read:
            raise ValueError(
                f"target.chat_template_options.{name}={options[name]} changes nothing: the chat template reads "
                f"{', '.join(read) or 'no option'}. Correct the name, or leave it out."
            )
    return "".join(f"{{% set {name} = {value!r} %}}" for name, value in options.items()) + template
