"""Kind 8, the template: what it marks, drops or asks for is honoured, or counted by reason."""

import copy
import logging

import pytest

from hass_lightning.data.prompts import parse_conversation
from hass_lightning.data.skipped import SkippedConversation
from hass_lightning.data.spans import has_tags
from hass_lightning.data.tokens import encode_all, encode_conversation, encode_prompt, load_tokenizer
from hass_lightning.target_model import TargetModel
from hass_lightning.types import Conversation, Message

END = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n{% generation %}ANSWER"
    "{% endgeneration %}TAIL{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}"
    "{% endfor %}" + END
)
TALK = (("system", "Be kind."), ("user", "What is it?"), ("assistant", "It is green."), ("user", "And now, what?"),
        ("assistant", "Blue."))  # fmt: skip


def talk(*turns, **more):
    return Conversation("c", tuple(Message(role, content) for role, content in turns), **more)


@pytest.fixture
def tokenizer(tiny):
    return copy.deepcopy(tiny.tokenizer)


def learned(tokenizer, tokens):
    return tokenizer.decode(tokens.input_ids.roll(-1)[tokens.loss_mask])


def marked(tokenizer, answer, tail=""):
    tokenizer.chat_template = MARKED.replace("ANSWER", answer).replace("TAIL", tail)
    assert has_tags(tokenizer)
    return tokenizer


# --- marks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "tail"),
    [("{{ m['content'] + '<|im_end|>\n' }}", ""), ("{{ m['content'] }}<|im_end|>", "\n"),
     ("{{ m['content'] }}", "<|im_end|>\n"), ("{{ m['content'] }}<|im_end|>\n\n", "")],
    ids=["with the line break", "with the end", "the answer", "with two line breaks"],
)  # fmt: skip
def test_the_mask_ends_with_the_answer_however_far_the_mark_reaches(tokenizer, tiny, answer, tail):
    marked(tokenizer, answer, tail)
    tokens = encode_conversation(tokenizer, talk(*TALK), 500, tiny.eos_token_ids)
    assert learned(tokenizer, tokens) == "It is green.Blue."
    assert int(tokens.loss_mask.sum()) == len("It is green.Blue.")
    plain = encode_conversation(tiny.tokenizer, talk(*TALK), 500, tiny.eos_token_ids)
    if tokens.input_ids.shape == plain.input_ids.shape:
        assert tokens.loss_mask.equal(plain.loss_mask)


SWALLOWS = {
    "the next user turn": "{{ m['content'] }}<|im_end|>\n{% if not loop.last %}<|im_start|>user\n"
    "{{ messages[loop.index]['content'] }}{% endif %}",
    "without an end token": "{{ m['content'] }}\n{% if not loop.last %}user: {{ messages[loop.index]['content'] }}"
    "{% endif %}",
}


@pytest.mark.parametrize("fault", SWALLOWS)
def test_a_mark_that_swallows_the_next_turn_is_refused_at_encoding(tokenizer, tiny, fault, caplog):
    marked(tokenizer, SWALLOWS[fault], "<|im_end|>\n")
    with pytest.raises(SkippedConversation, match="the generation tags of the chat template reach into"):
        encode_conversation(tokenizer, talk(*TALK), 500, tiny.eos_token_ids)
    one = talk(*TALK[1:3])  # nothing follows its answer
    tokens = encode_conversation(tokenizer, one, 500, tiny.eos_token_ids)
    assert learned(tokenizer, tokens).strip() == "It is green."
    with caplog.at_level(logging.WARNING):
        assert len(encode_all(tokenizer, [talk(*TALK), one], 500, tiny.eos_token_ids)) == 1
    assert "skipped 1: 'the generation tags" in caplog.text


def test_a_tool_that_returned_nothing_is_in_no_tag(tokenizer, tiny):
    marked(tokenizer, "{{ m['content'] }}<|im_end|>", "\n")
    conversation = talk(("user", "What?"), ("assistant", "Let me see."), ("tool", ""), ("assistant", "Nothing."))
    tokens = encode_conversation(tokenizer, conversation, 500, tiny.eos_token_ids)
    assert learned(tokenizer, tokens) == "Let me see.Nothing."


def test_an_answer_that_is_not_marked_or_changed_is_refused(tokenizer, tiny):
    marked(tokenizer, "{{ m['content'][:5] }}", "{{ m['content'][5:] }}<|im_end|>\n")
    with pytest.raises(SkippedConversation, match="leave out an answer"):
        encode_conversation(tokenizer, talk(*TALK), 500, tiny.eos_token_ids)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | upper }}<|im_end|>\n{% endfor %}" + END
    )
    with pytest.raises(SkippedConversation, match="cuts or changes an answer"):
        encode_conversation(tokenizer, talk(*TALK), 500, tiny.eos_token_ids)


@pytest.mark.parametrize("kind", ["prefixes", "marks"])
def test_answers_of_weight_0_are_context(tokenizer, tiny, kind):
    if kind == "marks":
        marked(tokenizer, "{{ m['content'] }}<|im_end|>", "\n")
    messages = tuple(Message(role, text, in_loss=text != "It is green.") for role, text in TALK)
    tokens = encode_conversation(tokenizer, Conversation("c", messages), 500, tiny.eos_token_ids)
    assert learned(tokenizer, tokens) == "Blue."
    whole = encode_conversation(tokenizer, talk(*TALK), 500, tiny.eos_token_ids)
    assert tokens.input_ids.equal(whole.input_ids)
    none = tuple(Message(role, text, in_loss=False) for role, text in TALK)
    with pytest.raises(SkippedConversation, match="an empty loss mask"):
        encode_conversation(tokenizer, Conversation("c", none), 500, tiny.eos_token_ids)
    last = tuple(Message(role, text, in_loss=text == "It is green.") for role, text in TALK)
    tokens = encode_conversation(
        tokenizer, Conversation("c", last), 500, tiny.eos_token_ids, last_turn_only=True
    )  # the last answer that is in the loss
    assert learned(tokenizer, tokens) == "It is green."


# --- reasoning and tools ---------------------------------------------------------------------------------------------

# Qwen3's way: reasoning under its own key, dropped from all but the last turn
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last and "
    "m.reasoning_content %}<think>\n{{ m.reasoning_content.strip('\n') }}\n</think>\n\n{% endif %}{{ m['content'] }}"
    "<|im_end|>\n{% endfor %}" + END
)
THOUGHT = (Message("user", "2+2?"), Message("assistant", "4", reasoning="Two and two."))


def test_reasoning_is_rendered_by_a_template_that_knows_it(tokenizer, tiny):
    tokenizer.chat_template = QWEN3
    tokens = encode_conversation(tokenizer, Conversation("c", THOUGHT), 500, tiny.eos_token_ids)
    assert learned(tokenizer, tokens) == "<think>\nTwo and two.\n</think>\n\n4"
    tokenizer.chat_template = tokenizer.chat_template.replace("reasoning_content", "thinking")  # gpt-oss
    again = encode_conversation(tokenizer, Conversation("c", THOUGHT), 500, tiny.eos_token_ids)
    assert again.input_ids.equal(tokens.input_ids) and again.loss_mask.equal(tokens.loss_mask)


@pytest.mark.parametrize("marks", [False, True])
def test_reasoning_that_the_template_drops_is_counted(tokenizer, tiny, marks):
    if marks:
        marked(tokenizer, "{{ m['content'] }}<|im_end|>", "\n")
    with pytest.raises(SkippedConversation, match=r"drops the reasoning of an answer.*data\.last_turn_only=true"):
        encode_conversation(tokenizer, Conversation("c", THOUGHT), 500, tiny.eos_token_ids)


def test_several_turns_under_qwen3s_template_name_the_key(tokenizer, tiny):
    tokenizer.chat_template = QWEN3
    several = Conversation("c", (*THOUGHT, Message("user", "3+3?"), Message("assistant", "6", reasoning="Three.")))
    with pytest.raises(ValueError, match=r"no conversation is left.*data\.last_turn_only=true"):
        encode_all(tokenizer, [several], 500, tiny.eos_token_ids)
    (tokens,) = encode_all(tokenizer, [several], 500, tiny.eos_token_ids, last_turn_only=True)
    assert learned(tokenizer, tokens) == "<think>\nThree.\n</think>\n\n6"
    assert "Two and two." not in tokenizer.decode(tokens.input_ids)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def test_tools_are_rendered_or_counted(tokenizer, tiny):
    conversation = talk(*TALK[1:3], tools=(TOOL,))
    with pytest.raises(SkippedConversation, match="drops the definitions of tools"):
        encode_conversation(tokenizer, conversation, 500, tiny.eos_token_ids)
    tokenizer.chat_template = "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}" + tokenizer.chat_template
    tokens = encode_conversation(tokenizer, conversation, 500, tiny.eos_token_ids)
    assert tokenizer.decode(tokens.input_ids).startswith('TOOLS [{"type": "function", "function": {"name": "add"')
    assert learned(tokenizer, tokens) == "It is green."
    prompt = encode_prompt(tokenizer, conversation.messages[:1], conversation.tools)
    assert tokens.input_ids[: len(prompt)].tolist() == prompt


def test_ids_of_calls_reach_a_template_that_needs_them(tokenizer, tiny):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}{% if c.id | length != 9 %}"
        "{{ raise_exception('ids have 9 characters') }}{% endif %}<call {{ c.id }}>{% endfor %}{% endif %}"
        "{% if m['role'] == 'tool' %}<result {{ m.tool_call_id }}>{% endif %}{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}"
    )
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "tool_calls": [{"id": "abcdefghi", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "3"},
        {"role": "assistant", "content": "three"},
    ]
    tokens = encode_conversation(tokenizer, parse_conversation({"messages": turns}, "x"), 500, tiny.eos_token_ids)
    text = tokenizer.decode(tokens.input_ids)
    assert "<call abcdefghi>" in text and "<result abcdefghi>3" in text
    turns[1]["tool_calls"][0]["id"] = "short"
    with pytest.raises(SkippedConversation, match="ids have 9 characters"):
        encode_conversation(tokenizer, parse_conversation({"messages": turns}, "x"), 500, tiny.eos_token_ids)


# --- options ---------------------------------------------------------------------------------------------------------

THINKS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% if today %}{{ today }}{% endif %}{% endif %}"
)


@pytest.fixture
def load(tiny, tmp_path):
    (tmp_path / "thinks.jinja").write_text(THINKS)

    def load(**options):
        return TargetModel.load(
            tiny.folder, "tiny", dtype="float32", chat_template=str(tmp_path / "thinks.jinja"),
            chat_template_options=options or None,
        )  # fmt: skip

    return load


def test_options_of_a_template_need_no_jinja_file(load, tiny):
    plain, quiet = load(), load(enable_thinking=False)
    messages = [Message("user", "hi")]
    prompts = [target.tokenizer.decode(encode_prompt(target.tokenizer, messages)) for target in (plain, quiet)]
    assert prompts[1] == prompts[0] + "<think>\n\n</think>\n\n"
    dated = load(today='it\'s "2026" {{ x }}').tokenizer
    assert dated.decode(encode_prompt(dated, messages)) == prompts[0] + 'it\'s "2026" {{ x }}'
    assert len({plain.fingerprint, quiet.fingerprint, load(enable_thinking=True).fingerprint}) == 3
    assert quiet.in_dtype(quiet.dtype).fingerprint == quiet.fingerprint == load(enable_thinking=False).fingerprint
    counted = load_tokenizer(tiny.folder, None, None)
    assert counted.chat_template == tiny.tokenizer.chat_template


@pytest.mark.parametrize(
    ("options", "words"),
    [({"enable_thinking": False, "thinking": True}, r"thinking=True changes nothing: .* enable_thinking, today"),
     ({"messages": []}, r"messages=\[\] changes nothing"), ({"x y": 1}, "x y=1 changes nothing")],
)  # fmt: skip
def test_an_option_that_the_template_does_not_read_is_refused(load, options, words):
    with pytest.raises(ValueError, match=rf"target\.chat_template_options\.{words}"):
        load(**options)


def test_options_come_from_the_command_line(train, tmp_path):
    (tmp_path / "thinks.jinja").write_text(THINKS)
    done = train(f"target.chat_template={tmp_path}/thinks.jinja", "+target.chat_template_options={thinking: false}")
    assert done.code == 1 and not done.traced
    assert "target.chat_template_options.thinking=False changes nothing" in done.error
