"""Injected faults of template, loss mask and data: hass-doctor reports each."""

import copy
from dataclasses import replace

import pytest

from hass_lightning.checks.data import (
    check_coverage,
    check_cut_answers,
    check_duplicates,
    check_leakage,
    check_truncation,
    check_usable,
    survey,
)
from hass_lightning.checks.template import (
    check_alignment,
    check_bos,
    check_end_of_turn,
    check_rendered,
    preview,
)
from hass_lightning.data import spans
from hass_lightning.data.tokens import encode_conversation
from hass_lightning.types import Conversation, Message

ENDS = frozenset({2})
GENERATION = "{% generation %}{{ message['content'] }}{% endgeneration %}"
HEADER = "<|im_start|>{{ message['role'] }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def template(assistant, other="{{ message['content'] }}", end="<|im_end|>", begin=""):
    """Return a ChatML template with the given turns."""
    return (
        f"{begin}{{% for message in messages %}}{HEADER}{{% if message['role'] == 'assistant' %}}{assistant}"
        f"{{% else %}}{other}{{% endif %}}{end}\n{{% endfor %}}{PROMPT}"
    )


TEMPLATES = {
    "marks nothing": template("{{ message['content'] }}{% if false %}{% generation %}x{% endgeneration %}{% endif %}"),
    "marks questions": template("{{ message['content'] }}", GENERATION),
    "marks all": template(GENERATION, GENERATION),
    "cuts reasoning": template("{{ message['content'].split('</think>')[-1] }}"),
    "adds a preamble": template("<think></think>{{ message['content'] }}"),
    "another end of turn": template("{{ message['content'] }}", end="</s>"),
    "two bos": template("{{ message['content'] }}", begin="<|endoftext|><|endoftext|>"),
    "rewrites turns": "{{ messages | length }} " + template("{{ message['content'] }}"),
    "refuses": "{{ raise_exception('no') }}",
}


def chat(*turns, id="c", **more):
    roles = ("user", "assistant") * len(turns)
    return Conversation(id, tuple(Message(role, text) for role, text in zip(roles, turns, strict=False)), **more)


CHATS = [
    chat("What is two plus two?", "<think>easily</think>It is four.", "And three?", "Seven, naturally.", id="one"),
    chat("Name a colour of the sky.", "Blue, on a clear day at noon.", id="two"),
]


@pytest.fixture
def with_template(tiny):
    """Return (tokenizer with that template, survey of the chats)."""

    def make(name, chats=CHATS):
        tokenizer = copy.deepcopy(tiny.tokenizer)
        tokenizer.chat_template = TEMPLATES.get(name, tokenizer.chat_template)
        return tokenizer, survey(chats, lambda c: encode_conversation(tokenizer, c, 10**9, ENDS))

    return make


def everything(tokenizer, found):
    findings = [check_usable(found), check_coverage(found)]
    if found.encoded:
        findings += [
            check_alignment(tokenizer, found.encoded),
            check_end_of_turn(tokenizer, found.encoded, ENDS),
            check_bos(tokenizer, found.encoded),
        ]
    return {finding.check: finding for finding in findings}


def test_correct_template_has_no_finding(with_template):
    assert {f.status for f in everything(*with_template("own")).values()} == {"ok"}


@pytest.mark.parametrize(
    ("fault", "check", "status", "words"),
    [
        ("marks nothing", "mask_coverage", "error", ["0.0 %", "2 of 2 conversations have an empty mask"]),
        ("marks questions", "template", "error", ["2 of 2", "leave out an answer"]),
        ("marks all", "template", "error", ["2 of 2", "reach into another turn"]),
        ("cuts reasoning", "template", "warning", ["1 of 2", "cuts or changes an answer"]),
        ("adds a preamble", "mask_alignment", "warning", ["more than the answers"]),
        ("another end of turn", "end_of_turn", "error", ["<|im_end|>"]),
        ("two bos", "bos", "error", ["<|endoftext|> twice"]),
        ("rewrites turns", "template", "error", ["rewrites earlier turns"]),
    ],
)
def test_template_fault_is_named(with_template, fault, check, status, words):
    finding = everything(*with_template(fault))[check]
    assert finding.status == status
    assert finding.cure
    assert [word for word in words if word not in finding.message] == [], finding.message


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("marks questions", ["2 of 2", "Whatistwoplustwo?", "It"]),
        ("marks all", ["2 of 2"]),
        ("cuts reasoning", ["1 of 2", "<think>"]),
    ],
)
def test_the_doctor_finds_a_wrong_mask_by_itself(with_template, monkeypatch, fault, words):
    """The encoder refuses these templates, too; the doctor must not depend on that."""
    for check in ("_refuse_changed_answers", "_refuse_misplaced_tags"):
        monkeypatch.setattr(spans, check, lambda *arguments: None)
    finding = everything(*with_template(fault))["mask_alignment"]
    assert finding.status == "error" and finding.cure
    assert [word for word in words if word not in finding.message] == [], finding.message


def test_template_without_bos_is_named(with_template):
    from tokenizers.processors import TemplateProcessing

    tokenizer, found = with_template("own")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert check_bos(tokenizer, found.encoded).status == "warning"


def test_sparse_loss_masks_give_a_warning(with_template):
    _, found = with_template("own", [chat("long " * 200, "Yes.")])
    finding = check_coverage(found)
    assert (finding.status, finding.message.split(" %")[0]) == ("warning", "0.4")


def test_text_with_template_markers_is_named(tiny):
    rendered = chat("<|im_start|>user\nHello there<|im_end|>", "[INST] well [/INST]", id="twice")
    finding = check_rendered(tiny.tokenizer, [*CHATS, rendered])
    assert finding.status == "error"
    assert "twice" in finding.message
    assert check_rendered(tiny.tokenizer, [*CHATS * 60, rendered]).status == "warning"
    assert check_rendered(tiny.tokenizer, CHATS).status == "ok"


@pytest.mark.parametrize(("limit", "status"), [(300, "ok"), (100, "warning"), (30, "error")])
def test_truncation_is_measured_in_tokens(with_template, limit, status):
    short = [chat("Why is that so?", "Because.")] * 20
    _, found = with_template("own", [*short, CHATS[0]])
    finding, *more = check_truncation(found, limit, 300)
    assert finding.status == status, finding.message
    assert [f.check for f in more] == (["context"] if limit < 75 else [])


def test_copies_and_leaks_are_found_whatever_their_punctuation():
    train = [*CHATS, chat("name a colour, of  the SKY", "Grey."), chat("Go on", "Well, well.")]
    assert check_duplicates(train).status == "ok"
    assert check_duplicates([*train, CHATS[0]]).status == "warning"
    prompts = {
        "mt_bench": [chat("Name a colour of the sky!", id="q7"), chat("Go on")],
        "clean": [chat("Who are you, then?")],
    }
    first, second = check_leakage(train, prompts)
    assert (first.status, second.status) == ("error", "ok")
    assert "1 of 2 mt_bench prompts" in first.message
    assert "q7" in first.message


def test_mostly_truncated_answers_are_found():
    train = [replace(chat("Why?", f"Because {n}."), finished=n < 3) for n in range(20)]
    found = check_cut_answers(train)
    assert found.status == "warning"
    assert "17 of 20" in found.message
    assert check_cut_answers(train[:15]).status == "ok"


def test_preview_colors_learned_tokens(with_template):
    tokenizer, found = with_template("own")
    text = preview(tokenizer, found.encoded[1][1])
    learned = [text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style)]
    assert learned == ["Blue, on a clear day at noon."]
    assert text.plain.startswith("<|im_start|>user\nName")
