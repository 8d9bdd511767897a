"""Where W&B is and whether this user is logged in there; W&B itself is not imported."""

from __future__ import annotations

import netrc
import os


def wandb_server() -> str:
    """The address of the W&B server."""
    return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"


def has_wandb_key() -> bool:
    """Whether there is a key: WANDB_API_KEY, or what `wandb login` left in ~/.netrc."""
    try:
        known = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        known = {}
    return bool(os.environ.get("WANDB_API_KEY")) or any("wandb" in host for host in known)
