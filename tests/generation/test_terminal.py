"""The chat: what is shown, colored, remembered and recorded, in a pseudo-terminal and without one."""

import io
import re
import subprocess
import sys

import pytest
from rich.console import Console
from rich.text import Text

from command_environment import command_environment
from hass_lightning.decoding import Autoregressive, StaticTree
from hass_lightning.generation.colors import Writer, describe, legend, save_svg, shown, style_of, summary
from hass_lightning.generation.terminal import ChatSettings, Session, run_chat
from hass_lightning.types import DecodeResult, Message, Sampling
from pseudo_terminal import PseudoTerminal
from terminal import check_snapshot, foreign_lines, run_in_terminal, script, wrapped_lines


def make_console(terminal=False, width=80):
    colors = "truecolor" if terminal else None
    return Console(file=io.StringIO(), width=width, height=30, force_terminal=terminal, color_system=colors)


def printed(console):
    return console.file.getvalue()


def make_session(chat, terminal=False, **settings):
    return Session(chat, ChatSettings(**{"max_new_tokens": 20, **settings}), make_console(terminal))


def masked(text):
    """Measured numbers replaced."""
    text = re.sub(r"\d+\.\d+ (tokens/s|without)", r"# \1", text)
    return re.sub(r"\(\d+\.\d+×\)", "(#×)", text)


def without_spaces(text):
    return re.sub(r"\s+", "", text)


def test_a_word_of_several_tokens_is_not_broken_and_keeps_its_colors():
    console = make_console(terminal=True, width=20)
    writer = Writer(console)
    for text, count in (("one two three fo", 1), ("ur five", 3), (" six\n\nse", 2), ("ven", 5)):
        writer.write(text, style_of(count))
    writer.end()
    plain = Text.from_ansi(printed(console)).plain
    assert [line.rstrip() for line in plain.splitlines()] == ["one two three four", "five six", "", "seven"]
    assert "\x1b[32mur" in printed(console) and "\x1b[1;35mven" in printed(console)


def test_a_model_cannot_control_the_terminal():
    assert shown("a\x1b[2J\x9b1mb\n\tc\r") == "a�[2J�1mb\n\tc�"


def test_the_legend_and_the_settings_of_a_decoder():
    assert legend().plain.split(":")[1].split() == ["1", "2", "3", "4", "5+"]
    assert style_of(7) == style_of(5) != style_of(4)
    assert describe(StaticTree()) == "static_tree, paths 9"


def test_the_numbers_under_an_answer():
    seconds = {"prefill": 5.0, "draft": 0.5, "verify": 1.5}
    result = DecodeResult(list(range(9)), [3, 1, 1, 0], [3] * 4, [5] * 4, seconds)
    baseline = DecodeResult(list(range(5)), [0] * 4, [0] * 4, [0] * 4, {"prefill": 9.0, "verify": 2.0})
    lines = [line.plain for line in summary(result, baseline, Autoregressive())]
    assert lines == ["τ 2.25 · 4.0 tokens/s, 2.0 without the head (2.00×)", "9 tokens in 5 forwards · autoregressive"]
    only_one = DecodeResult([1], [], [], [], {"prefill": 1.0})
    assert summary(only_one, None, Autoregressive())[0].plain == "τ – · – tokens/s"


def test_answers_stream_into_a_history(chat):
    session = make_session(chat, system="Be brief.")
    first = session.ask("Why?")
    second = session.ask("And then?")
    assert [message.role for message in session.messages] == ["user", "assistant"] * 2
    asked = [Message("system", "Be brief."), Message("user", "Why?")]
    assert first.text == chat.generate(asked, 20).text
    asked += [Message("assistant", first.text), Message("user", "And then?")]
    assert second.text == chat.generate(asked, 20).text
    assert shown(first.text) in printed(session.console)


def test_without_a_terminal_there_are_no_colors_and_no_legend(chat):
    session = make_session(chat)
    session.explain()
    answer = session.ask("Why?")
    assert "\x1b" not in printed(session.console)
    lines = masked(printed(session.console)).splitlines()
    assert lines[-2:] == [
        f"τ {answer.tokens_per_forward:.2f} · # tokens/s, # without the head (#×)",
        f"20 tokens in {len(answer.result.accepted) + 1} forwards · dynamic_tree, num_nodes 12, depth 2, width 5",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_side_by_side_says_that_the_texts_are_equal(chat, terminal):
    session = make_session(chat, terminal, compare=True, max_new_tokens=30)
    answer = session.ask("Why?")
    text = Text.from_ansi(printed(session.console)).plain
    assert f"the texts are equal ({len(answer.result.token_ids)} tokens)" in text
    assert "with the head" in text and "autoregressive" in text
    sampled = make_session(chat, terminal, compare=True, sampling=Sampling(1.0))
    sampled.ask("Why?")
    assert "same distribution" in printed(sampled.console)


def test_texts_that_differ_are_reported_with_their_place(chat):
    session = make_session(chat)
    results = [DecodeResult(ids, [], [], [], {}) for ids in ([1, 2, 3, 4], [1, 2, 5, 4])]
    assert session._verdict(results).startswith("the texts differ from token 3 on: float32")


def test_ctrl_c_stops_an_answer_and_keeps_what_is_there(chat, monkeypatch):
    session = make_session(chat)
    whole = chat.generate("Why?", 20)
    stream = session._stream

    def interrupted(messages, max_new_tokens, baseline=False):
        for number, chunk in enumerate(stream(messages, max_new_tokens, baseline)):
            if number == 3:
                raise KeyboardInterrupt
            yield chunk

    monkeypatch.setattr(session, "_stream", interrupted)
    answer = session.ask("Why?")
    assert whole.text.startswith(answer.text) and len(answer.result.token_ids) < 20
    assert session.messages[-1].content == answer.text
    assert "stopped" in printed(session.console)


def test_commands_empty_lines_and_mistakes_of_a_chat(chat):
    session = make_session(chat, max_new_tokens=4)
    lines = iter(["", "   ", "Why?", "/clear", KeyboardInterrupt, "/what", "x" * 3000, "/exit", "never read"])

    def read():
        line = next(lines)
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    run_chat(session, read)
    assert next(lines) == "never read"
    assert not session.messages  # forgotten, and the long question was refused
    text = " ".join(printed(session.console).split())
    for words in (
        "new conversation",
        "unknown command /what",
        "Ctrl-D quits",
        "shorten or remove the prompt",
    ):
        assert words in text


def test_the_end_of_the_input_ends_a_chat(chat):
    def read():
        raise EOFError

    run_chat(make_session(chat), read)


def test_a_session_is_recorded_as_an_image_without_the_network(chat, tmp_path):
    session = make_session(chat, terminal=True)
    session.explain()
    session.ask("Why <is> it?")
    save_svg(tmp_path / "chat.svg", session.shown, "hass-generate")
    svg = (tmp_path / "chat.svg").read_text()
    assert "Why&#160;&lt;is&gt;&#160;it?" in svg and "without" in svg
    assert "url(" not in svg.replace("url(#", "") and "@font-face" not in svg
    assert len(svg) < 500_000


@pytest.mark.parametrize("key", ["max_new_tokens", "baseline_tokens"])
def test_settings_out_of_range_are_named(key):
    with pytest.raises(ValueError, match=f"{key}=-1"):
        ChatSettings(**{key: -1})


def asked(lines):
    return sum(line.startswith("›") for line in lines)


def with_answer_checked(screen, answer):
    """The screen with a word in place of the answer, which a random target makes up."""
    before, begins, rest = screen.partition("› Why?\n")
    body, ends, after = rest.partition("\nτ ")
    assert without_spaces(body) == without_spaces(shown(answer.text))
    assert after.startswith(f"{answer.tokens_per_forward:.2f} ")
    assert f"16 tokens in {len(answer.result.accepted) + 1} forwards" in after
    return f"{before}{begins}ANSWER{ends}{after}"


@pytest.mark.parametrize("columns", [80, 120])
def test_the_screen_of_a_chat(chat, run_dir, tmp_path, cache_dir, columns):
    command = [sys.executable, "-m", "hass_lightning.commands.generate", f"draft={run_dir}", "max_new_tokens=16"]
    terminal = PseudoTerminal(command, command_environment(tmp_path, cache_dir), tmp_path, columns)
    prompts = 1
    for keys in ("Why?\n", "/clear\n", "\n", "\x03", "/exit\n"):
        terminal.wait_for(lambda lines, n=prompts: asked(lines) == n and terminal.cursor_line().startswith("›"))
        terminal.type(keys)
        prompts += 1
    assert terminal.close() == 0
    screen = with_answer_checked("\n".join(terminal.lines()).rstrip() + "\n", chat.generate("Why?", 16))
    assert not foreign_lines(screen) and not wrapped_lines(screen, columns)
    check_snapshot(f"generate_chat_{columns}", screen)
    assert not list(tmp_path.iterdir())  # nothing is written


def test_a_chat_without_a_terminal(chat, run_dir, tmp_path, cache_dir):
    words = [*script("generate"), f"draft={run_dir}", "max_new_tokens=16"]
    environment = command_environment(tmp_path, cache_dir)
    asks = "Why?\n/clear\n\n/exit\n"
    done = subprocess.run(words, input=asks, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    screen = with_answer_checked(done.stdout, chat.generate("Why?", 16))
    assert not foreign_lines(screen) and not done.stderr
    check_snapshot("generate_chat_without_terminal", screen)


@pytest.mark.parametrize("columns", [80, 120, None], ids=["80", "120", "without_terminal"])
def test_the_screen_of_one_answer(chat, run_dir, tmp_path, cache_dir, columns):
    words = [*script("generate"), f"draft={run_dir}", "max_new_tokens=16", "prompt=Why?"]
    environment = command_environment(tmp_path, cache_dir)
    environment.pop("COLUMNS", None)
    if columns:
        text, code = run_in_terminal(words, columns, cwd=tmp_path, env=environment)
        assert code == 0 and not wrapped_lines(text, columns)
        legend_line, _, rest = text.partition("\n")
    else:
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert not done.stderr
        legend_line, rest = "no legend", done.stdout
    screen = with_answer_checked(f"{legend_line}\n› Why?\n{rest}", chat.generate("Why?", 16))
    assert not foreign_lines(screen)
    check_snapshot(f"generate_{columns or 'without_terminal'}", screen.replace("› Why?\n", ""))
