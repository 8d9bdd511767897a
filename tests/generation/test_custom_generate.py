"""`model.generate(custom_generate=speculative(head))` does what `generate` does, or refuses by name."""

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList
from transformers.generation import BaseStreamer, StoppingCriteria, StoppingCriteriaList

import hass_lightning
from hass_lightning.decoding import Chain, DynamicTree, PromptLookup, StaticTree
from hass_lightning.draft import EagleDraft, SavedDraft

VOCAB = 13  # so small that a wide tree of a random head often has the right token
PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])
WIDE = DynamicTree(num_nodes=24, depth=3, width=6)


def make_model(seed=0, dtype=torch.float64, hidden_size=32):
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden_size, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=11, pad_token_id=12,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        model.lm_head.weight.data.mul_(30)
    return model.to(dtype).eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def head(model):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        draft = EagleDraft.from_target(model.config)
    return SavedDraft(draft.double().eval(), None, {})


def both(model, head, decoder=WIDE, seed=5, ids=PROMPT, **options):
    """(plain output, output with the head, the loop) of the same call."""
    loop = hass_lightning.speculative(head, decoder)
    options = {"max_new_tokens": 40, **options}
    torch.manual_seed(seed)
    plain = model.generate(ids, **options)
    torch.manual_seed(seed)
    return plain, model.generate(ids, custom_generate=loop, **options), loop


@pytest.mark.parametrize("decoder", [WIDE, Chain(depth=3), StaticTree(), PromptLookup(), None], ids=str)
@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "temperature": 0.7}], ids=str)
def test_the_output_is_that_of_generate(model, head, decoder, options):
    plain, ours, loop = both(model, head, decoder, eos_token_id=None, **options)
    assert plain.tolist() == ours.tolist()
    assert ours.shape[1] == PROMPT.shape[1] + 40
    if decoder is WIDE:
        assert loop.result.acceptance_length > 1.2


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
        {"do_sample": True, "top_k": 4, "top_p": 0.8, "temperature": 1.3},
        {"do_sample": True, "min_p": 0.05, "typical_p": 0.9, "repetition_penalty": 1.1},
        {"suppress_tokens": [1, 2, 3], "bad_words_ids": [[4, 5]], "forced_eos_token_id": 11},
        {"eos_token_id": [2, 7, 11]},
        {"eos_token_id": [2, 7], "min_new_tokens": 20},
        {"max_length": 12, "max_new_tokens": None},
        {"max_new_tokens": 1},
        {"use_cache": False},
        {"do_sample": True, "watermarking_config": {"bias": 2.5, "seeding_scheme": "lefthash"}},
    ],
    ids=str,
)
def test_processors_and_ends_are_those_of_generate(model, head, options):
    plain, ours, _ = both(model, head, **options)
    assert plain.tolist() == ours.tolist()


class Counting(LogitsProcessor):
    """A processor with a state: it favors another token at each call, and notes what it saw."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.tolist())
        scores = scores.clone()
        scores[:, len(self.seen) % VOCAB] += 4
        return scores


def test_a_processor_with_a_state_sees_each_token_once(model, head):
    options = {"max_new_tokens": 30, "eos_token_id": None}
    plain, ours = Counting(), Counting()
    expected = model.generate(PROMPT, logits_processor=LogitsProcessorList([plain]), **options)
    loop = hass_lightning.speculative(head, WIDE)
    found = model.generate(PROMPT, logits_processor=LogitsProcessorList([ours]), custom_generate=loop, **options)
    assert expected.tolist() == found.tolist()
    assert plain.seen == ours.seen


class AfterTwo(StoppingCriteria):
    """Ends when the answer has its fifth token for the second time."""

    def __call__(self, input_ids, scores, **_):
        new = input_ids[:, PROMPT.shape[1] :]
        return (new == new[:, 4:5]).sum(-1) >= 2 if new.shape[1] > 5 else torch.zeros(1, dtype=torch.bool)


class Collector(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value.tolist())

    def end(self):
        self.ended += 1


def test_stopping_criteria_and_streamer_are_honored(model, head):
    options = {"max_new_tokens": 60, "eos_token_id": None, "do_sample": True, "temperature": 1.5}
    plain, ours = Collector(), Collector()
    criteria = StoppingCriteriaList([AfterTwo()])
    torch.manual_seed(0)
    expected = model.generate(PROMPT, stopping_criteria=criteria, streamer=plain, **options)
    torch.manual_seed(0)
    loop = hass_lightning.speculative(head, WIDE)
    found = model.generate(PROMPT, stopping_criteria=criteria, streamer=ours, custom_generate=loop, **options)
    assert expected.tolist() == found.tolist()
    assert found.shape[1] < PROMPT.shape[1] + 60
    assert plain.values == ours.values
    assert plain.ended == ours.ended == 1


def test_a_dict_with_scores_and_logits(model, head):
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain, ours, _ = both(model, head, repetition_penalty=1.5, max_new_tokens=12, **options)
    assert type(plain) is type(ours)
    assert plain.sequences.tolist() == ours.sequences.tolist()
    for name in ("scores", "logits"):
        for expected, found in zip(plain[name], ours[name], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def filled_cache(model):
    return model(PROMPT[:, :3], past_key_values=DynamicCache(config=model.config)).past_key_values


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (lambda model: {"num_beams": 2}, "num_beams"),
        (lambda model: {"assistant_model": model}, "assistant_model"),
        (lambda model: {"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        (lambda model: {"do_sample": True, "num_return_sequences": 2}, "num_return_sequences"),
        (lambda model: {"inputs": PROMPT.repeat(2, 1)}, "several prompts"),
        (lambda model: {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1]])}, "attention_mask"),
        (lambda model: {"position_ids": torch.arange(1, 8)[None]}, "position_ids"),
        (lambda model: {"past_key_values": filled_cache(model)}, "past_key_values"),
        (lambda model: {"inputs_embeds": model.get_input_embeddings()(PROMPT)}, "inputs_embeds"),
        (lambda model: {"synced_gpus": True}, "synced_gpus"),
        (lambda model: {"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states"),
        (lambda model: {"max_new_tokens": 122}, "max_new_tokens=122"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_supported_is_refused_by_name(model, head, options, name):
    call = {"inputs": PROMPT, "max_new_tokens": 8, **options(model)}
    if "inputs_embeds" in call:
        del call["inputs"]
    with pytest.raises(ValueError, match=name):
        model.generate(**call, custom_generate=hass_lightning.speculative(head))


def test_the_model_is_left_as_it_was(head):
    model = make_model()
    before = {name: (value.data_ptr(), value.requires_grad) for name, value in model.named_parameters()}
    kinds = [type(module) for module in model.modules()]
    model.train()
    model.generate(PROMPT, custom_generate=hass_lightning.speculative(head), max_new_tokens=8)
    assert {name: (value.data_ptr(), value.requires_grad) for name, value in model.named_parameters()} == before
    assert [type(module) for module in model.modules()] == kinds
    assert model.training


def test_weights_that_moved_or_changed_are_followed(head):
    model, loop = make_model(), hass_lightning.speculative(head, WIDE)
    options = {"max_new_tokens": 20, "eos_token_id": None}
    model.generate(PROMPT, custom_generate=loop, **options)
    model = model.float()  # new storage
    with torch.no_grad():
        model.lm_head.weight.neg_()  # the same storage
    assert (
        model.generate(PROMPT, custom_generate=loop, **options).tolist() == model.generate(PROMPT, **options).tolist()
    )


def test_attention_without_tree_masks_and_a_head_of_another_model_are_refused(head):
    model = make_model()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attn_implementation=eager"):
        model.generate(PROMPT, custom_generate=hass_lightning.speculative(head), max_new_tokens=8)
    with pytest.raises(ValueError, match="hidden 32"):
        make_model(hidden_size=64).generate(PROMPT, custom_generate=hass_lightning.speculative(head), max_new_tokens=8)
    with pytest.raises(ValueError, match="no draft head"):
        hass_lightning.speculative("nowhere")


def test_the_arguments_that_a_callable_does_not_get_are_read_from_generate_alone(head):
    from hass_lightning.generation.custom_generate import _argument_of_generate

    def generate(streamer):
        return _argument_of_generate("streamer")

    assert generate(SimpleNamespace()) is None  # somebody else's function of that name


@pytest.mark.slow
def test_smollm2_as_an_ordinary_transformers_model():
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hass_lightning.runs.config import config_folder

    with initialize_config_dir(config_folder(), version_base="1.3"):
        folder = instantiate(compose("generate").target.path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Write three sentences about the sea."}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    loop = hass_lightning.speculative("package://heads/smollm2_135m_hass")
    plain = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    ours = model.generate(**inputs, max_new_tokens=48, do_sample=False, custom_generate=loop)
    assert plain.tolist() == ours.tolist()
    assert loop.result.acceptance_length > 1.3
