"""Random conversation files and random override strings: each works, or is refused with key, value and fix.

The fast tests run a few hundred examples, the slow ones 10,000 (HASS_FUZZ_EXAMPLES changes it) in ten parts: always the
same ones.
"""

import contextlib
import copy
import gzip
import json
import logging
import os
import re

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hass_lightning.data.layouts import ANSWER, CONTEXT, QUESTION, SYSTEM, TURNS
from hass_lightning.data.prompts import JsonLines
from hass_lightning.data.tokens import encode_all
from hass_lightning.data.turns import REASONING, ROLES
from hass_lightning.runs.config import config_folder
from hass_lightning.target_model.tiny import byte_tokenizer
from hass_lightning.training.settings import check_settings

NUM_EXAMPLES = int(os.environ.get("HASS_FUZZ_EXAMPLES", "10000"))
ENDS = frozenset({2})
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m.reasoning_content or '' }}{{ m['content'] }}{% for c in m.tool_calls or [] %}"
    "{{ '(' + c['function']['arguments'] + ')' }}{% endfor %}<|im_end|>\n{% endgeneration %}{% else %}"
    "{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)


def run(test, part, num_examples, *strategies):
    """Call `test` with `num_examples` drawn examples, the same ones in every run."""
    quiet = settings(max_examples=num_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    seed(part)(quiet(given(*strategies)(test)))()


# --- conversation files ----------------------------------------------------------------------------------------------

TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", " ", "\ud83d", "a\udc00", "\x00", "<|im_end|>", "<|im_start|>user\nx", "<think>a</think>b",
                     "{}", '{"a": 1}', "[]", "Grüße", "\u2028", "\ufeff", "yes", "no"]),
)  # fmt: skip
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.floats(), TEXTS)
JSON = st.recursive(
    SCALARS, lambda each: st.lists(each, max_size=3) | st.dictionaries(TEXTS, each, max_size=3), max_leaves=6
)


def mostly(plausible):
    """Nine in ten of the plausible kind."""
    return st.integers(0, 9).flatmap(lambda number: plausible if number else JSON)


ARGUMENTS = st.one_of(st.just('{"a": 1}'), st.dictionaries(TEXTS, SCALARS, max_size=2), TEXTS)
FUNCTION = st.fixed_dictionaries({"name": TEXTS}, optional={"arguments": ARGUMENTS})
CALLS = st.lists(st.fixed_dictionaries({"function": mostly(FUNCTION)}, optional={"id": SCALARS}), max_size=2)
PARTS = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "thinking", "image_url", None])},
                                       optional={"text": TEXTS, "thinking": TEXTS}), max_size=3)  # fmt: skip
CONTENT = mostly(TEXTS | PARTS)
TURN = st.fixed_dictionaries(
    {},
    optional={
        "role": mostly(st.sampled_from(sorted(ROLES))), "from": mostly(st.sampled_from(sorted(ROLES))),
        "content": CONTENT, "value": CONTENT, "text": CONTENT, "weight": mostly(st.sampled_from([0, 1, None])),
        "tool_calls": mostly(CALLS), "function_call": JSON, **dict.fromkeys(REASONING, mostly(TEXTS)),
        "input": TEXTS, "output": TEXTS, "tool_call_id": SCALARS, "name": SCALARS,
    },
)  # fmt: skip
WORDS = st.one_of(st.sampled_from(["yes", "no", "Why is that?", "Grüße 日本", "a\u2028b", "🙂"]), TEXTS)
PAIR = st.tuples(WORDS, WORDS).map(
    lambda texts: [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
)
GOOD = st.lists(PAIR, min_size=1, max_size=2).map(lambda pairs: [turn for pair in pairs for turn in pair])
RECORD = st.fixed_dictionaries(
    {},
    optional={
        **{name: mostly(GOOD | st.lists(mostly(TURN), max_size=4)) for name in TURNS},
        **{name: mostly(TEXTS) for name in {*QUESTION, *ANSWER, *CONTEXT, *SYSTEM}},
        "turns": mostly(st.lists(TEXTS, max_size=3)), "history": mostly(st.lists(st.lists(TEXTS), max_size=2)),
        "tools": mostly(st.lists(st.fixed_dictionaries({"name": TEXTS}), max_size=2)), "functions": JSON,
        "id": SCALARS, "category": SCALARS, "split": mostly(st.sampled_from(["train", "valid", "test", None])),
        "finished": mostly(st.booleans()),
    },
)  # fmt: skip
GOOD_RECORD = GOOD.map(lambda turns: {"messages": turns})
COLUMNS = st.one_of(
    st.none(), st.none(), st.none(),
    st.dictionaries(
        st.sampled_from(["prompt", "response", "messages", "role", "content", "split", "id", "nothing"]),
        st.none() | st.sampled_from(["prompt", "answer", "chat", "messages", "role"]), max_size=2,
    ),
)  # fmt: skip


@st.composite
def files(draw):
    """(name, bytes) of a file that may be a data set."""
    records = draw(st.lists(st.one_of(GOOD_RECORD, GOOD_RECORD, mostly(RECORD)), min_size=1, max_size=3))
    lines = [json.dumps(record, ensure_ascii=draw(st.booleans())) for record in records]
    text = draw(st.sampled_from(["\n", "\r\n", "\n\n", "\n\ufeff"])).join(lines)
    if draw(st.integers(0, 4)) == 0:
        text = json.dumps(records, indent=draw(st.sampled_from([None, 1])))
    encoding = draw(st.sampled_from(["utf-8"] * 8 + ["utf-8-sig", "utf-16", "latin-1"]))
    content = text.encode(encoding, errors=draw(st.sampled_from(["replace", "surrogatepass"] if "utf" in encoding
                                                                else ["replace"])))  # fmt: skip
    damage = draw(st.sampled_from(["none"] * 6 + ["cut", "insert", "random"]))
    place = draw(st.integers(0, len(content)))
    if damage == "cut":
        content = content[:place]
    elif damage == "insert":
        content = content[:place] + draw(st.binary(min_size=1, max_size=4)) + content[place:]
    elif damage == "random":
        content = draw(st.binary(max_size=60))
    if draw(st.integers(0, 9)) == 0:
        content = gzip.compress(content)[: draw(st.sampled_from([None, -3]))]
    return draw(st.sampled_from(["x.jsonl", "x.json", "x.jsonl.gz", "x"])), content


def data_property(folder):
    plain, marked = byte_tokenizer(), byte_tokenizer()
    marked.chat_template = MARKED
    outcomes = {"used": 0, "refused": 0}

    def check(file, columns, with_marks, last_turn_only):
        name, content = file
        (folder / name).write_bytes(content)
        tokenizer = marked if with_marks else plain
        try:
            conversations = JsonLines(str(folder / name), columns=columns).load(None)
            tokens = encode_all(tokenizer, conversations, 400, ENDS, last_turn_only=last_turn_only)
        except ValueError as error:
            sentence = str(error)
            assert name in sentence or "data.source.columns" in sentence or "data.max_length" in sentence, sentence
            assert type(error) is ValueError, (type(error), sentence)
            sentence.encode()  # it can be printed
            outcomes["refused"] += 1
            return
        by_id = {conversation.id: conversation for conversation in conversations}
        for each in tokens:
            said = by_id[each.id]
            assert len(each.input_ids) == len(each.loss_mask) and not each.loss_mask[-1]
            if with_marks or any(m.tool_calls or "<|" in m.content for m in said.messages) or len(by_id) < len(tokens):
                continue
            answers = [m.content for m in said.messages if m.role == "assistant" and m.in_loss]
            learned = tokenizer.decode(each.input_ids.roll(-1)[each.loss_mask])
            assert learned == "".join(answers[-1:] if last_turn_only else answers)
        outcomes["used"] += 1

    return check, outcomes


def fuzz_data(folder, part, num_examples):
    logging.disable(logging.WARNING)
    try:
        check, outcomes = data_property(folder)
        run(check, part, num_examples, files(), COLUMNS, st.booleans(), st.booleans())
    finally:
        logging.disable(logging.NOTSET)
    assert min(outcomes.values()) > num_examples // 10, outcomes  # the examples are neither all good nor all bad


def test_files_of_conversations(tmp_path):
    fuzz_data(tmp_path, 0, 250)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(1, 8))
def test_many_files_of_conversations(tmp_path, part):
    fuzz_data(tmp_path, part, NUM_EXAMPLES // 10)


# --- override strings ------------------------------------------------------------------------------------------------

VALUES = st.one_of(
    st.sampled_from([
        "null", "true", "false", "0", "1", "-1", "1.5", "inf", "-inf", "nan", "1e400", "''", '""', "auto", "nope",
        "???", "${seed}", "${nothing}", "${oc.env:NOTHING}", "[]", "[0,1]", "[[1]]", "{}", "{a:1}",
        "{_target_:os.system}",
        "00:00:00:02", "99:99:99:99", "2026-01-01", "10000000000000000000000", "0x10", "1_000", "a b", "a=b", "'a,b'",
        "a,b", "1,2", "range(3)", "choice(1,2)", "{", "[", "\\", "'", "$", "${", "ü", "\x00", "\ud800", "+", "~",
    ]),
    st.integers().map(str), st.floats().map(str), st.text(max_size=8),
)  # fmt: skip


def leaves(node, prefix=""):
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")


@pytest.fixture(scope="module")
def config():
    with initialize_config_dir(config_folder(), version_base="1.3"):
        return compose("train", ["experiment=smoke", "paths.run_dir=run", "name=smoke", "logger=csv"])


def overrides_of(config):
    """Strings `key=value`, most of them with a key of the config; those that choose a group are left out."""
    content = OmegaConf.to_container(config)
    known = [key for key in leaves(content) if not (isinstance(content.get(key), dict))]
    checked = [key for key in known if key.startswith(("trainer.", "compute.", "estimate.")) or "." not in key]
    keys = st.one_of(st.sampled_from(checked), st.sampled_from(checked), st.sampled_from(known), st.text(max_size=6))
    signs = st.sampled_from([""] * 9 + ["+", "++", "~"])
    return st.lists(st.builds("{}{}={}".format, signs, keys, VALUES), min_size=1, max_size=2)


def settings_property(config):
    parser = OverridesParser.create()
    outcomes = {"accepted": 0, "refused": 0, "refused by Hydra": 0}

    def check(words):
        before = {}
        try:
            parsed = parser.parse_overrides(list(words))
            if any(each.is_sweep_override() for each in parsed):
                return  # values of a sweep come one by one
            for each in parsed:
                top = str(each.key_or_group).split(".")[0]
                before.setdefault(top, copy.deepcopy(config._get_node(top)) if top in config else None)
            ConfigLoaderImpl._apply_overrides_to_config(parsed, config)
            check_settings(config)
            outcomes["accepted"] += 1
        except (HydraException, OmegaConfBaseException) as error:
            str(error)
            outcomes["refused by Hydra"] += 1
        except ValueError as error:
            sentence = str(error)
            names = [word.lstrip("+~").partition("=")[0].rpartition(".")[2] for word in words]
            by_interpolation = re.match(r"[\w.]+=", sentence)  # another key has the value of this one
            assert by_interpolation or any(name in sentence for name in names), (words, sentence)
            assert re.search(r": \w+ \w+|\. (Give|Set|Use) ", sentence), sentence  # what to do instead
            outcomes["refused"] += 1
        finally:
            OmegaConf.set_struct(config, False)
            for top, node in before.items():
                with contextlib.suppress(KeyError):
                    del config[top]
                if node is not None:
                    config._set_item_impl(top, node)
            OmegaConf.set_struct(config, True)

    return check, outcomes


def fuzz_settings(config, part, num_examples):
    whole = OmegaConf.to_container(config)
    check, outcomes = settings_property(config)
    run(check, part, num_examples, overrides_of(config))
    assert OmegaConf.to_container(config) == whole  # each example began with the composed config
    assert min(outcomes.values()) > num_examples // 20, outcomes


def test_override_strings(config):
    fuzz_settings(config, 0, 150)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(1, 4))
def test_many_override_strings(config, part):
    fuzz_settings(config, part, NUM_EXAMPLES // 10)
