"""EAGLE-3's head and training-time test as published, written apart from the package (no shared code, no modules).

At step j, row r reads token r + j and its own output of step j - 1, sits at position r + j - 1, and attends to the
step-1 keys of rows up to r and to its own keys of steps 2 … j. Shapes: T rows, D hidden, H heads, d head size.
"""

import torch
from torch.nn import functional as F


def norm(x, weight, eps):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def turn(x, positions, theta):
    """Rotary embedding of [H, T, d], angles in float32 as in the official code."""
    d = x.shape[-1]
    angles = positions.float()[:, None] * (1.0 / theta ** (torch.arange(0, d, 2).float() / d))
    cos, sin = (torch.cat([f, f], -1).to(x.dtype) for f in (angles.cos(), angles.sin()))
    return x * cos + torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1) * sin


def eagle_inputs(w, c, e, h):
    u = torch.cat([e, h], -1) @ w["fc.weight"].T
    return u, u


def eagle3_inputs(w, c, e, h):
    e = norm(e, w["midlayer.input_layernorm.weight"], c.rms_norm_eps)
    return torch.cat([e, norm(h, w["midlayer.hidden_norm.weight"], c.rms_norm_eps)], -1), h


def finish(w, c, residual, attended):
    y = residual + attended @ w["self_attn.o_proj.weight"].T
    n = norm(y, w["post_attention_layernorm.weight"], c.rms_norm_eps)
    gate = F.silu(n @ w["mlp.gate_proj.weight"].T)
    return y + (gate * (n @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T


def logits(w, c, out):
    return norm(out, w["norm.weight"], c.rms_norm_eps) @ w["lm_head.weight"].T


def shifted(weights, config, embeddings, features, depth, detach, eagle3):
    """Outputs [T - j + 1, D] of steps j = 1 … depth, of embeddings of tokens t + 1 and features of tokens t."""
    w, c = weights, config
    prefix = "midlayer." if eagle3 else "layers.0."
    inner = {name.removeprefix(prefix): value for name, value in w.items()}
    groups, d, theta = c.num_key_value_heads, c.head_dim, c.rope_parameters["rope_theta"]
    repeat, T = c.num_attention_heads // groups, len(embeddings)
    h = features @ w["fc.weight"].T if eagle3 else features
    keys, values, outputs = [], [], []
    for step in range(1, depth + 1):
        rows = T - step + 1
        u, residual = (eagle3_inputs if eagle3 else eagle_inputs)(w, c, embeddings[step - 1 :], h[:rows])
        q, k, v = (
            (u @ inner[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, d)).transpose(0, 1) for name in "qkv"
        )
        positions = torch.arange(rows) + step - 1
        keys.append(turn(k, positions, theta).repeat_interleave(repeat, 0))
        values.append(v.repeat_interleave(repeat, 0))
        q = turn(q, positions, theta) / d**0.5
        causal = (q @ keys[0][:, :rows].mT).masked_fill(torch.ones(rows, rows).triu(1).bool(), -torch.inf)
        own = [(q * key[:, :rows]).sum(-1, keepdim=True) for key in keys[1:]]
        a = torch.cat([causal, *own], -1).softmax(-1)
        o = a[..., :rows] @ values[0][:, :rows]
        o = o + sum(a[..., rows + n, None] * value[:, :rows] for n, value in enumerate(values[1:]))
        outputs.append(finish(inner, c, residual, o.transpose(0, 1).flatten(1)))
        h = outputs[-1].detach() if detach else outputs[-1]
    return outputs
