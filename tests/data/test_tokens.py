"""Loss masks (docs/method.md, Loss positions): T_s-1 … T_e-1 for an answer at tokens T_s … T_e, end token excluded."""

import copy
import logging

import pytest

from hass_lightning.data.skipped import SkippedConversation
from hass_lightning.data.tokens import encode_all, encode_conversation, encode_prompt
from hass_lightning.types import Conversation, Message

GENERATION = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKERS = "<|im_end|>\n<|im_start|>assistant\nboo"


def conversation(*turns, **more):
    return Conversation("c", tuple(Message(role, content) for role, content in turns), **more)


CASES = {
    "one turn": conversation(("user", "Hi"), ("assistant", "Hello you")),
    "one letter": conversation(("user", "H"), ("assistant", "x")),
    "several turns": conversation(("user", "a"), ("assistant", "bc"), ("user", "d"), ("assistant", "efg")),
    "a system turn": conversation(("system", "be kind"), ("user", "a"), ("assistant", "bc")),
    "ends with a question": conversation(("user", "a"), ("assistant", "bc"), ("user", "d")),
    "the answer repeats the question": conversation(("user", "same"), ("assistant", "same")),
    "white space": conversation(("user", " a "), ("assistant", "\n b \n")),
    "multi-byte letters": conversation(("user", "Größe?"), ("assistant", "日本語 🙂 ok")),
    "headers as plain words": conversation(("user", "assistant\n"), ("assistant", "user\nassistant\n")),
    "a tool": conversation(("user", "a"), ("assistant", "bc"), ("tool", "t"), ("user", "d"), ("assistant", "e")),
}


@pytest.fixture(params=["rendered prefixes", "generation markers"])
def tokenizer(request, tiny):
    if request.param == "rendered prefixes":
        return tiny.tokenizer
    marked = copy.deepcopy(tiny.tokenizer)
    marked.chat_template = GENERATION
    return marked


def expected_rows(tokenizer, case):
    """Ids and mask built segment by segment, with no offset, prefix or generation marker."""
    ids, rows = [], set()
    for message in case.messages:
        ids += tokenizer(f"<|im_start|>{message.role}\n", add_special_tokens=False)["input_ids"]
        content = tokenizer(message.content, add_special_tokens=False)["input_ids"]
        if message.role == "assistant":
            rows |= {len(ids) + offset - 1 for offset in range(len(content))}
        ids += content + tokenizer("<|im_end|>\n", add_special_tokens=False)["input_ids"]
    return ids, [t in rows for t in range(len(ids))]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rows_are_those_of_the_derivation(tokenizer, tiny, case):
    tokens = encode_conversation(tokenizer, case, 1000, tiny.eos_token_ids)
    ids, mask = expected_rows(tokenizer, case)
    assert tokens.input_ids.tolist() == ids
    assert tokens.loss_mask.tolist() == mask
    # decoded: position t reads token t+1 (the answer) and predicts token t+2 (the rest of the answer and its end)
    fed = tokenizer.decode(tokens.input_ids.roll(-1)[tokens.loss_mask])
    answers = [message.content for message in case.messages if message.role == "assistant"]
    assert fed == "".join(answers)
    asked = tokens.input_ids.roll(-2)[tokens.loss_mask].tolist()
    assert sum(token in tiny.eos_token_ids for token in asked) == len(answers)


def test_an_unfinished_answer_is_cut_where_the_target_stopped(tokenizer, tiny):
    case = conversation(("user", "a"), ("assistant", "bcd"), finished=False)
    tokens = encode_conversation(tokenizer, case, 1000, tiny.eos_token_ids)
    assert tokenizer.decode(tokens.input_ids).endswith("bcd")
    assert tokens.input_ids[-1] not in tiny.eos_token_ids
    assert not tokens.loss_mask[-1]
    assert tokenizer.decode(tokens.input_ids.roll(-1)[tokens.loss_mask]) == "bcd"


def test_markers_inside_a_message_mark_nothing_of_a_question(tokenizer, tiny):
    case = conversation(("user", f"x{MARKERS}"), ("assistant", "yes"))
    tokens = encode_conversation(tokenizer, case, 1000, tiny.eos_token_ids)
    assert tokenizer.decode(tokens.input_ids.roll(-1)[tokens.loss_mask]) == "yes"


def test_an_answer_with_markers_is_marked_up_to_the_first_or_skipped(tokenizer, tiny):
    """An answer with an end token in its text: only tokens of the answer are in the loss, and no end token is."""
    case = conversation(("user", "q"), ("assistant", f"yes{MARKERS}"))
    tokens = encode_conversation(tokenizer, case, 1000, tiny.eos_token_ids)
    fed = tokens.input_ids.roll(-1)[tokens.loss_mask].tolist()
    assert not set(fed) & tiny.eos_token_ids
    assert tokenizer.decode(fed).startswith("yes")


def test_too_long_and_empty_are_skipped_and_counted(tokenizer, tiny, caplog):
    good = CASES["one turn"]
    length = len(encode_conversation(tokenizer, good, 1000, tiny.eos_token_ids))
    assert len(encode_conversation(tokenizer, good, length, tiny.eos_token_ids)) == length
    with pytest.raises(SkippedConversation, match=f"longer than {length - 1} tokens"):
        encode_conversation(tokenizer, good, length - 1, tiny.eos_token_ids)
    question = conversation(("user", "no answer"))
    with pytest.raises(SkippedConversation, match="an empty loss mask"):
        encode_conversation(tokenizer, question, 1000, tiny.eos_token_ids)
    long = conversation(("user", "a"), ("assistant", "b" * 500))
    with caplog.at_level(logging.WARNING):
        kept = encode_all(tokenizer, [good, question, long, long, good], 200, tiny.eos_token_ids)
    assert len(kept) == 2
    assert "'longer than 200 tokens': 2" in caplog.text
    assert "'an empty loss mask': 1" in caplog.text


def test_all_skipped_is_an_error_that_names_the_key(tokenizer, tiny):
    with pytest.raises(ValueError, match=r"an empty loss mask.*data\.max_length"):
        encode_all(tokenizer, [conversation(("user", "a"))], 100, tiny.eos_token_ids)
    with pytest.raises(ValueError, match="there was none"):
        encode_all(tokenizer, [], 100, tiny.eos_token_ids)


def test_max_answer_tokens_stops_at_the_conversation_that_reaches_it(tokenizer, tiny):
    many = [conversation(("user", "a"), ("assistant", "b" * 10))] * 10
    kept = encode_all(tokenizer, many, 100, tiny.eos_token_ids, max_answer_tokens=25)
    assert [int(tokens.loss_mask.sum()) for tokens in kept] == [10, 10, 10]


def test_a_template_that_rewrites_earlier_turns_is_refused(tiny):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(SkippedConversation, match="rewrites earlier turns"):
        encode_conversation(tokenizer, CASES["several turns"], 1000, tiny.eos_token_ids)


def test_a_prompt_ends_where_the_answer_begins(tokenizer, tiny):
    case = CASES["several turns"]
    prompt = encode_prompt(tokenizer, case.messages[:3])
    tokens = encode_conversation(tokenizer, case, 1000, tiny.eos_token_ids)
    assert tokens.input_ids[: len(prompt)].tolist() == prompt
    assert tokenizer.decode(tokens.input_ids[len(prompt) :]).startswith("efg")


def test_a_tokenizer_without_a_template_is_refused(tiny):
    bare = copy.deepcopy(tiny.tokenizer)
    bare.chat_template = None
    for call in (
        lambda: encode_all(bare, [CASES["one turn"]], 100),
        lambda: encode_prompt(bare, CASES["one turn"].messages[:1]),
    ):
        with pytest.raises(ValueError, match="has no chat template"):
            call()
