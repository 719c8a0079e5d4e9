"""Named templates write what the models' own do, and files are read with care."""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_deft.data import templates
from megatron_deft.data.chat import encode, render_messages
from megatron_deft.data.templates import TEMPLATES, apply_template, renderer
from megatron_deft.errors import UserError
from tests.data import tokenizers
from tests.data.conftest import CHATML

MARKS = (
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"
)  # fmt: skip


@pytest.fixture(scope="module")
def bare() -> Any:
    """A tokenizer that has every named template's marks, and no template."""
    tokenizer = tokenizers.make("gpt2", with_added=False)
    tokenizer.add_tokens(list(MARKS), special_tokens=True)
    return tokenizer


@pytest.fixture
def tokenizer(bare: Any) -> Any:
    return copy.deepcopy(bare)


SYSTEM = {"role": "system", "content": "Be kind."}
TURNS = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Me."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
]
# What each model's own template gives, written out.
OFFICIAL = {
    "chatml": (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMe.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nMe.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nSo.<|eot_id|>"
    ),
    "deepseek": ("<s>Be kind.\n\nUser: Who?\n\nAssistant: Me.</s>User: Why?\n\nAssistant: So.</s>"),
    "gemma": (
        "<s><start_of_turn>user\nWho?<end_of_turn>\n<start_of_turn>model\nMe.<end_of_turn>\n"
        "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\nSo.<end_of_turn>\n"
    ),
}
OFFICIAL["qwen"] = OFFICIAL["chatml"]
TRAINED = {
    "chatml": ["Me.<|im_end|>", "So.<|im_end|>"],
    "qwen": ["Me.<|im_end|>", "So.<|im_end|>"],
    "llama3": ["Me.<|eot_id|>", "So.<|eot_id|>"],
    "deepseek": [" Me.</s>", " So.</s>"],
    "gemma": ["Me.<end_of_turn>", "So.<end_of_turn>"],
}
OPENING = {
    "chatml": "<|im_start|>assistant\n",
    "qwen": "<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "deepseek": "Assistant:",
    "gemma": "<start_of_turn>model\n",
}


def trained(tokenizer: Any, messages: Any, tools: Any = None) -> list[str]:
    """The texts of the trained tokens, run by run."""
    (sample,) = encode(tokenizer, [render_messages(tokenizer, messages, tools)])
    edges = np.flatnonzero(np.diff((sample.weights > 0).astype(int), prepend=0, append=0))
    return [tokenizer.decode(sample.tokens[a:b].tolist()) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_named_template_writes_the_official_text(tokenizer: Any, name: str) -> None:
    apply_template(tokenizer, name)
    messages = TURNS if name == "gemma" else [SYSTEM, *TURNS]
    text = "".join(render_messages(tokenizer, messages).pieces)
    assert text == OFFICIAL[name]
    assert text == tokenizer.apply_chat_template(messages, tokenize=False)
    asked = renderer(tokenizer, None)(messages[:-1], True)
    assert text.startswith(asked)
    assert asked.endswith(OPENING[name])
    assert trained(tokenizer, messages) == TRAINED[name]


def test_qwen_says_what_qwen_says_without_a_system_message(tokenizer: Any) -> None:
    apply_template(tokenizer, "qwen")
    text = "".join(render_messages(tokenizer, TURNS[:2]).pieces)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMe.<|im_end|>\n"
    )


@pytest.mark.parametrize(("name", "stripped"), [("llama3", True), ("gemma", True), ("qwen", False)])
def test_white_space_is_kept_or_not_as_the_model_has_it(
    tokenizer: Any, name: str, stripped: bool
) -> None:
    apply_template(tokenizer, name)
    text = renderer(tokenizer, None)([{"role": "user", "content": " x \n"}], False)
    assert (" x \n" not in text) == stripped


TOOL = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}
ASKED = [
    {"role": "user", "content": "Time?"},
    {"role": "assistant", "tool_calls": [{"name": "get_time", "arguments": '{"zone": "CET"}'}]},
    {"role": "tool", "content": "noon"},
    {"role": "assistant", "content": "Noon."},
]


def test_qwen_with_tools(tokenizer: Any) -> None:
    apply_template(tokenizer, "qwen")
    again = ASKED[2:3] * 2
    text = "".join(render_messages(tokenizer, [*ASKED[:2], *again, ASKED[3]], [TOOL]).pieces)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.\n\n# Tools\n\n"
        "You may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}\n'
        "</tools>\n\nFor each function call, return a json object with function name and arguments "
        "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nTime?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "get_time", "arguments": {"zone": "CET"}}\n'
        "</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nnoon\n</tool_response>\n<tool_response>\nnoon\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\nNoon.<|im_end|>\n"
    )
    assert trained(tokenizer, ASKED, [TOOL]) == [
        '<tool_call>\n{"name": "get_time", "arguments": {"zone": "CET"}}\n</tool_call><|im_end|>',
        "Noon.<|im_end|>",
    ]


def test_llama3_with_tools(tokenizer: Any) -> None:
    apply_template(tokenizer, "llama3")
    text = "".join(render_messages(tokenizer, [SYSTEM, *ASKED], [TOOL]).pieces)
    assert text == (
        "<s><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, please respond "
        "with a JSON for a function call with its proper arguments that best answers the given "
        'prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of '
        "argument name and its value}.Do not use variables.\n\n"
        '{\n    "type": "function",\n    "function": {\n        "name": "get_time",\n'
        '        "parameters": {\n            "type": "object"\n        }\n    }\n}\n\n'
        "Time?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        '{"name": "get_time", "parameters": {"zone": "CET"}}<|eot_id|>'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"noon"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\nNoon.<|eot_id|>"
    )
    assert trained(tokenizer, ASKED, [TOOL]) == [
        '{"name": "get_time", "parameters": {"zone": "CET"}}<|eot_id|>',
        "Noon.<|eot_id|>",
    ]


def test_llama3_refuses_two_calls_in_a_turn(tokenizer: Any) -> None:
    apply_template(tokenizer, "llama3")
    twice = {**ASKED[1], "tool_calls": ASKED[1]["tool_calls"] * 2}  # type: ignore[operator]
    with pytest.raises(UserError, match="one tool call in a turn"):
        render_messages(tokenizer, [ASKED[0], twice, *ASKED[2:]], [TOOL])


@pytest.mark.parametrize("name", ["chatml", "deepseek", "gemma"])
@pytest.mark.parametrize(("messages", "tools"), [(TURNS, [TOOL]), (ASKED, None)])
def test_templates_without_tools_refuse_them_by_name(
    tokenizer: Any, name: str, messages: Any, tools: Any
) -> None:
    apply_template(tokenizer, name)
    with pytest.raises(UserError, match=f"{name} has no tool.*: use qwen or llama3"):
        render_messages(tokenizer, messages, tools)


def test_gemma_refuses_a_system_message(tokenizer: Any) -> None:
    apply_template(tokenizer, "gemma")
    with pytest.raises(UserError, match="gemma has no system messages"):
        render_messages(tokenizer, [SYSTEM, *TURNS])


def test_marks_that_are_no_tokens_are_named_with_what_fits() -> None:
    tokenizer = tokenizers.make("gpt2", with_added=False)
    with pytest.raises(UserError) as error:
        apply_template(tokenizer, "llama3")
    text = str(error.value)
    assert "<|start_header_id|>, <|end_header_id|>, <|eot_id|> are no single token" in text
    assert "whose marks it has (chatml, qwen, deepseek, or a file)" in text
    assert "add the tokens to the tokenizer and the model" in text
    assert tokenizer.chat_template is None


def test_a_token_that_the_tokenizer_does_not_name_is_named(tokenizer: Any) -> None:
    tokenizer.bos_token = None
    with pytest.raises(UserError, match="chat template gemma writes bos_token, which tokenizer"):
        apply_template(tokenizer, "gemma")


def test_a_template_that_writes_an_eos_that_is_not_there_is_refused(tokenizer: Any) -> None:
    apply_template(tokenizer, "deepseek")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="writes eos_token, which the tokenizer lacks"):
        render_messages(tokenizer, TURNS)


def test_a_file(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(CHATML, encoding="utf-8")
    apply_template(tokenizer, str(path))
    assert "".join(render_messages(tokenizer, [SYSTEM, *TURNS]).pieces) == OFFICIAL["chatml"]


@pytest.mark.parametrize("name", ["mistral", "there/is/none.jinja", ""])
def test_an_unknown_name_lists_the_names(tokenizer: Any, name: str) -> None:
    with pytest.raises(UserError, match="one of chatml, qwen, llama3, deepseek, gemma, or the pat"):
        apply_template(tokenizer, name)


def test_a_syntax_error_is_named_with_file_and_line(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "broken.jinja"
    path.write_text("{% for m in messages %}\n{{ m.role }\n{% endfor %}", encoding="utf-8")
    with pytest.raises(UserError, match="^" + re.escape(f"{path} line 2: unexpected '}}'")):
        apply_template(tokenizer, str(path))
    path.write_bytes(b"\xff{{ x }}")
    with pytest.raises(UserError, match="cannot be read as UTF-8"):
        apply_template(tokenizer, str(path))


def test_a_syntax_error_in_the_tokenizers_own_template(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% if %}"
    with pytest.raises(UserError, match=r"^chat template of .*: Expected an expression"):
        render_messages(tokenizer, TURNS)


# As Llama 3.2's, and as those that ask for the date without a look whether they may.
DATED = [
    "{% if strftime_now is defined %}{% set date = strftime_now('%d %b %Y') %}{% else %}"
    "{% set date = '26 Jul 2024' %}{% endif %}{{ date + '\n' }}",
    "{{ strftime_now('%d %b %Y') + '\n' }}",
]


@pytest.mark.parametrize("head", DATED)
def test_the_date_is_always_the_same(tokenizer: Any, head: str) -> None:
    tokenizer.chat_template = head + CHATML
    text = "".join(render_messages(tokenizer, [SYSTEM, *TURNS]).pieces)
    assert text == "26 Jul 2024\n" + OFFICIAL["chatml"]


# Keys that are there, are not, have a method's name, or are none of a template's business.
READS_KEYS = (
    "{% set m = messages[0] %}{{ m.role + m['role'] + m['items'] + m.get('content') }}"
    "{{ m.none is defined }}{{ m['none'] is defined }}{{ m.items is string }}{{ m[0] }}"
    "{{ m.__class__ is defined }}{{ m.role.upper() }}{{ m.items() | length }}"
)


@pytest.mark.parametrize(
    "template",
    [
        *(named.text for named in TEMPLATES.values()),
        "{% generation %}x{% endgeneration %}",
        READS_KEYS,
        "{{ messages[0].none.none }}",
        "{{ messages[0].role.__class__.__mro__ }}",
        "{{ messages[0].update({}) }}",
    ],
)
@pytest.mark.parametrize("tools", [None, [TOOL]])
@pytest.mark.parametrize("messages", [TURNS, ASKED[:1], [{**SYSTEM, "items": "i"}, *TURNS]])
def test_it_is_what_apply_chat_template_gives(
    tokenizer: Any, template: str, tools: Any, messages: Any
) -> None:
    tokenizer.chat_template = template
    for generation in (False, True):
        try:
            expected = tokenizer.apply_chat_template(
                messages, tools, tokenize=False, add_generation_prompt=generation
            )
        except Exception:
            with pytest.raises(UserError):
                renderer(tokenizer, tools)(messages, generation)
        else:
            assert renderer(tokenizer, tools)(messages, generation) == expected


def test_without_the_helper_of_transformers(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply_template(tokenizer, "qwen")
    expected = render_messages(tokenizer, TURNS)
    templates._compile.cache_clear()
    monkeypatch.setattr(templates, "_compiler", lambda: None)
    assert templates._compile(tokenizer.chat_template).template is None
    assert render_messages(tokenizer, TURNS) == expected
    tokenizer.chat_template = DATED[1]
    with pytest.raises(UserError, match="writes today's date"):
        render_messages(tokenizer, TURNS)
    templates._compile.cache_clear()
