"""Secrets stay out of configs, logs and records: refused in a config, struck out elsewhere."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from typing import Any

STRUCK_OUT = "***"
# singular: max_answer_tokens and token_ids are no secrets; nor are a tokenizer's eos_token and the like
NAME = re.compile(
    r"(?:^|[._-])(?:api[_-]?key|access[_-]?key|secret|password|passwd|credentials?"
    r"|(?<!bos_)(?<!eos_)(?<!pad_)(?<!unk_)(?<!mask_)(?<!stop_)token)$",
    re.IGNORECASE,
)
SHAPE = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|AKIA[A-Z0-9]{16})\b")


def _known() -> list[str]:
    """Values of the environment variables that are named like secrets, longest first."""
    values = {value for name, value in os.environ.items() if NAME.search(name) and len(value) >= 8}
    return sorted(values, key=len, reverse=True)


def redact(text: str) -> str:
    """`text` without secrets: what the environment holds as one, and what is shaped like a key of a known service."""
    for value in _known():
        text = text.replace(value, STRUCK_OUT)
    return SHAPE.sub(STRUCK_OUT, text)


def redacted(content: Any, name: str = "") -> Any:
    """Plain containers without secrets: texts redacted, and struck out whole under a name like `token` or `api_key`."""
    if isinstance(content, dict):
        return {key: redacted(value, str(key)) for key, value in content.items()}
    if isinstance(content, list):
        return [redacted(value, name) for value in content]
    if isinstance(content, str):
        return STRUCK_OUT if content and NAME.search(name) else redact(content)
    return content


def find_secrets(content: Any, name: str = "") -> Iterator[str]:
    """The keys of an unresolved config whose value is a secret; an interpolation (${oc.env:HF_TOKEN}) is none."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from find_secrets(value, f"{name}.{key}".lstrip("."))
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from find_secrets(value, f"{name}[{number}]")
    elif isinstance(content, str) and not content.startswith("${") and redacted(content, name) != content:
        yield name


class RedactingFilter(logging.Filter):
    """Strikes secrets out of log records."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Never drops a record."""
        text = record.getMessage()
        if (clean := redact(text)) != text:
            record.msg, record.args = clean, ()
        return True
