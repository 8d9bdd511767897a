"""A random two-layer LLaMA with a byte tokenizer, to run the whole pipeline in seconds without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hass_lightning.target_model.source import made_once

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tiny_llama(seed: int = 0, hidden_size: int = 64, num_layers: int = 2) -> Path:
    """Return the folder of the tiny target, created once per seed and size.

    Embedding and LM head are scaled up, so that its distributions are neither flat nor a copy of the last token and a
    draft head can learn them.
    """
    name = f"tiny-{seed}-{hidden_size}-{num_layers}-3"
    return made_once(name, lambda folder: _write(folder, seed, hidden_size, num_layers))


def byte_tokenizer() -> Any:
    """A tokenizer of single bytes, with ChatML as its template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: number for number, symbol in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[2], pad_token=SPECIAL[0],
        additional_special_tokens=[SPECIAL[1]],
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    return fast


def _write(folder: Path, seed: int, hidden_size: int, num_layers: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers, num_attention_heads=4, num_key_value_heads=2, head_dim=hidden_size // 4,
        max_position_embeddings=2048,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(20.0)
            model.lm_head.weight.mul_(15.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
