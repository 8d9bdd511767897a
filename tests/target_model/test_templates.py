"""Custom and packaged chat templates: rendering and loss masks."""

import copy

import pytest
import torch

from hass_lightning.checks.template import check_alignment
from hass_lightning.data.rendering import render
from hass_lightning.data.skipped import SkippedConversation
from hass_lightning.data.tokens import encode_conversation, encode_prompt
from hass_lightning.target_model import TargetModel
from hass_lightning.types import Conversation, Message

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


def talk(*turns):
    return tuple(Message(role, content) for role, content in turns)


TWO = talk(("user", "hi"), ("assistant", "hello"), ("user", "and?"), ("assistant", "fine"))


@pytest.fixture(scope="module")
def load(tiny):
    def load(template):
        return TargetModel.load(tiny.folder, "tiny", dtype="float32", chat_template=template)

    return load


def test_custom_template_changes_the_fingerprint(tiny, load, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}")
    target = load(str(file))
    assert render(target.tokenizer, TWO[:1]) == "[user] hi\n"
    assert target.fingerprint != tiny.fingerprint
    assert target.in_dtype(torch.float64).fingerprint == target.fingerprint
    assert load(None).fingerprint == tiny.fingerprint


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "does not exist"), ("{% for m in %}", "not a Jinja template"), ("{{ messages", "not a Jinja template")],
)
def test_invalid_template_names_the_key(load, tmp_path, text, words):
    if text is not None:
        (tmp_path / "mine.jinja").write_text(text)
    with pytest.raises(ValueError, match=f"target.chat_template=.*{words}"):
        load(str(tmp_path / "mine.jinja"))


def test_generation_tags_are_used(load, tmp_path):
    (tmp_path / "mine.jinja").write_text(
        "{% for m in messages %}{%- generation -%}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    )
    assert render(load(str(tmp_path / "mine.jinja")).tokenizer, TWO[:2]) == "hihello"


def test_vicuna_template_matches_fastchat(load):
    tokenizer = load("package://target_model/templates/vicuna.jinja").tokenizer
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    assert render(tokenizer, TWO) == f"{bos}{VICUNA} USER: hi ASSISTANT: hello{eos}USER: and? ASSISTANT: fine{eos}"
    assert render(tokenizer, TWO[:3], add_generation_prompt=True).endswith(f"{eos}USER: and? ASSISTANT:")
    system = talk(("system", "Be brief."), ("user", "hi"))
    assert render(tokenizer, system, add_generation_prompt=True) == f"{bos}Be brief. USER: hi ASSISTANT:"
    with pytest.raises(SkippedConversation, match="the chat template refuses it: Vicuna knows no tool turn"):
        render(tokenizer, talk(("user", "a"), ("assistant", "b"), ("tool", "c")))


def test_r1_loss_mask_includes_the_reasoning(load):
    target = load("package://target_model/templates/deepseek_r1_distill.jinja")
    tokenizer = target.tokenizer
    thought = "because\n</think>\n\nyes"
    for answer in (thought, f"<think>\n{thought}"):  # as the target wrote it after its prompt, and as servers return it
        messages = talk(("user", "why?"), ("assistant", answer))
        text = render(tokenizer, messages)
        assert text == f"{tokenizer.bos_token}<｜User｜>why?<｜Assistant｜><think>\n{thought}{tokenizer.eos_token}"
        assert text.startswith(render(tokenizer, messages[:1], add_generation_prompt=True))
        tokens = encode_conversation(tokenizer, Conversation("c", messages), 500, target.eos_token_ids)
        assert tokenizer.decode(tokens.input_ids.roll(-1)[tokens.loss_mask]) == thought
        assert check_alignment(tokenizer, [(Conversation("c", messages), tokens)]).status == "ok"


# Qwen3 and R1: reasoning is removed from earlier answers, so that a prefix of the text does not stay the same
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_only_the_last_turn_is_used_if_earlier_ones_are_rewritten(tiny):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = FORGETS
    first, last = "<think>a</think>b", "<think>c</think>d"
    messages = talk(("system", "s"), ("user", "q"), ("assistant", first), ("user", "r"), ("assistant", last))
    arguments = (500, tiny.eos_token_ids)
    with pytest.raises(SkippedConversation, match="rewrites earlier turns"):
        encode_conversation(tokenizer, Conversation("c", messages), *arguments)
    for more in ((), talk(("user", "unanswered"))):
        conversation = Conversation("c", messages + more)
        tokens = encode_conversation(tokenizer, conversation, *arguments, last_turn_only=True)
        text = tokenizer.decode(tokens.input_ids)
        assert text.endswith(f"{last}<|im_end|>\n")
        assert first not in text
        assert tokenizer.decode(tokens.input_ids.roll(-1)[tokens.loss_mask]) == last
        assert check_alignment(tokenizer, [(conversation, tokens)], last_turn_only=True).status == "ok"
        assert check_alignment(tokenizer, [(conversation, tokens)]).status == "error"
        prompt = encode_prompt(tokenizer, messages[:4])
        assert tokens.input_ids[: len(prompt)].tolist() == prompt
    with pytest.raises(SkippedConversation, match="empty loss mask"):
        encode_conversation(tokenizer, Conversation("c", messages[:2]), *arguments, last_turn_only=True)


def test_loss_mask_of_the_last_turn_equals_that_among_all_turns(tiny):
    conversation = Conversation("c", TWO)
    every = encode_conversation(tiny.tokenizer, conversation, 500, tiny.eos_token_ids)
    last = encode_conversation(tiny.tokenizer, conversation, 500, tiny.eos_token_ids, last_turn_only=True)
    assert torch.equal(every.input_ids, last.input_ids)
    rows = every.loss_mask.nonzero()[:, 0].tolist()
    assert last.loss_mask.nonzero()[:, 0].tolist() == rows[len("hello") :]


def test_conversation_is_skipped_if_the_template_refuses_a_system_turn(tiny):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + FORGETS
    )
    with pytest.raises(SkippedConversation, match="the chat template refuses it: no system role"):
        encode_conversation(tokenizer, Conversation("c", talk(("system", "s")) + TWO), 500)


# tool calls and results as in Qwen2.5, shortened
CALLS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_loss_mask_includes_tool_calls_but_not_results(tiny):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    function = {"name": "add", "arguments": {"a": 2}}
    asked = Message("assistant", "", ({"type": "function", "function": function},))
    messages = (*talk(("user", "q")), asked, *talk(("tool", "5"), ("assistant", "five")))
    tokenizer.chat_template = CALLS
    tokens = encode_conversation(tokenizer, Conversation("c", messages), 500, tiny.eos_token_ids)
    learned = tokenizer.decode(tokens.input_ids.roll(-1)[tokens.loss_mask])
    assert learned == '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>five'
    assert check_alignment(tokenizer, [(Conversation("c", messages), tokens)]).status == "ok"
    tokenizer.chat_template = tiny.tokenizer.chat_template
    with pytest.raises(SkippedConversation, match="drops tool calls"):
        encode_conversation(tokenizer, Conversation("c", messages), 500, tiny.eos_token_ids)
