"""Text generation with a trained head: in Python, inside transformers' `generate`, and as a chat in the terminal."""

from hass_lightning.generation.chat_model import Answer, ChatModel, Chunk
from hass_lightning.generation.custom_generate import Speculative, speculative
from hass_lightning.generation.from_config import load

__all__ = ["Answer", "ChatModel", "Chunk", "Speculative", "load", "speculative"]
