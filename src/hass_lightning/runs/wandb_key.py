"""Address and login state of W&B, without importing it."""

from __future__ import annotations

import netrc
import os


def wandb_server() -> str:
    """Return the address of the W&B server."""
    return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"


def has_wandb_key() -> bool:
    """Whether there is an API key, in WANDB_API_KEY or in ~/.netrc (written by `wandb login`)."""
    try:
        known = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        known = {}
    return bool(os.environ.get("WANDB_API_KEY")) or any("wandb" in host for host in known)
