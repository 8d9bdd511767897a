"""Redaction of secrets: they are refused in configs, and replaced in logs and records."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from typing import Any

REDACTED = "***"
# singular only: max_answer_tokens and token_ids are not secrets; neither are a tokenizer's eos_token and the like
NAME = re.compile(
    r"(?:^|[._-])(?:api[_-]?key|access[_-]?key|secret|password|passwd|credentials?"
    r"|(?<!bos_)(?<!eos_)(?<!pad_)(?<!unk_)(?<!mask_)(?<!stop_)token)$",
    re.IGNORECASE,
)
SHAPE = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|AKIA[A-Z0-9]{16})\b")


def _known() -> list[str]:
    """Return the values of environment variables that are named like secrets, longest first."""
    values = {value for name, value in os.environ.items() if NAME.search(name) and len(value) >= 8}
    return sorted(values, key=len, reverse=True)


def redact(text: str) -> str:
    """Replace secrets in `text`: secret values of the environment, and keys in the format of a known service."""
    for value in _known():
        text = text.replace(value, REDACTED)
    return SHAPE.sub(REDACTED, text)


def redacted(content: Any, name: str = "") -> Any:
    """Replace secrets in plain containers; strings under a name like `token` or `api_key` are replaced completely."""
    if isinstance(content, dict):
        return {key: redacted(value, str(key)) for key, value in content.items()}
    if isinstance(content, list):
        return [redacted(value, name) for value in content]
    if isinstance(content, str):
        return REDACTED if content and NAME.search(name) else redact(content)
    return content


def find_secrets(content: Any, name: str = "") -> Iterator[str]:
    """Yield the keys of an unresolved config that hold a secret; interpolations (${oc.env:HF_TOKEN}) are allowed."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from find_secrets(value, f"{name}.{key}".lstrip("."))
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from find_secrets(value, f"{name}[{number}]")
    elif isinstance(content, str) and not content.startswith("${") and redacted(content, name) != content:
        yield name


class RedactingFilter(logging.Filter):
    """Replaces secrets in log records."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Redact the record; never drops it."""
        text = record.getMessage()
        if (clean := redact(text)) != text:
            record.msg, record.args = clean, ()
        return True
