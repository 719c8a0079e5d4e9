"""Chat templates: by name or from a file, and the rendering of one.

The texts are those that the models' own templates give for a plain conversation, so that a model
trained here is asked as its family always is:

  chatml    <|im_start|>role, a line end, the content, <|im_end|>; nothing is added
  qwen      chatml with Qwen2.5's system message where there is none, and its tools (Hermes)
  llama3    Llama 3's headers; with tools as Llama 3.1 (JSON in the first user message)
  deepseek  DeepSeek LLM's and DeepSeekMath's "User: ", "Assistant: "
  gemma     <start_of_turn>user and model; no system message

*The date.* Some templates write today's (`strftime_now`; Llama 3.2's does). Data must not change
with the day they are made on, so the date is always 26 July 2024, which those of Llama 3.1 and 3.2
have as their own default. Another one is had by writing it into a template file.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from megatron_deft.errors import UserError

Render = Callable[[Sequence[Mapping[str, Any]], bool], str]  # messages, whether to open a turn

_MARK = re.compile(r"<[|\uff5c][^<>]+[|\uff5c]>")  # DeepSeek writes the wide bar
_DATE = datetime(2024, 7, 26)
_METHODS = frozenset(dir(dict))


class _Named(NamedTuple):
    text: str
    marks: tuple[str, ...]  # texts that must be one token each
    roles: tuple[str, ...] = ()  # tokens that the tokenizer must name


_NO_TOOLS = """\
{%- if tools %}{{ raise_exception("NAME has no tools: use qwen or llama3") }}{% endif %}
{%- for message in messages %}
    {%- if message['role'] == 'tool' or 'tool_calls' in message %}
        {{- raise_exception("NAME has no tool calls: use qwen or llama3") }}
    {%- endif %}
{%- endfor %}
"""

_CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

_QWEN = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = 'You are a helpful assistant.' %}
    {%- set turns = messages %}
{%- endif %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}
    {{- '\\n\\n# Tools\\n\\n' }}
    {{- 'You may call one or more functions to assist with the user query.\\n\\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and ' }}
    {{- 'arguments within <tool_call></tool_call> XML tags:\\n' }}
    {{- '<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in turns %}
    {%- if message['role'] == 'tool' %}
        {%- if loop.previtem['role'] != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + message['content'] + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem['role'] != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
    {%- else %}
        {{- '<|im_start|>' + message['role'] }}
        {%- if message['content'] or 'tool_calls' not in message %}
            {{- '\\n' + message['content'] }}
        {%- endif %}
        {%- if 'tool_calls' in message %}
            {%- for call in message['tool_calls'] %}
                {{- '\\n<tool_call>\\n{"name": "' + call['function']['name'] }}
                {{- '", "arguments": ' + call['function']['arguments'] | tojson }}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

_LLAMA3 = """\
{%- set turns = messages %}
{%- set open = '<|start_header_id|>' %}
{%- set close = '<|end_header_id|>\\n\\n' %}
{{- bos_token }}
{%- if tools %}
    {{- open + 'system' + close + 'Environment: ipython\\n' }}
    {{- 'Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n' }}
    {%- if turns[0]['role'] == 'system' %}
        {{- turns[0]['content'] | trim }}
        {%- set turns = turns[1:] %}
    {%- endif %}
    {{- '<|eot_id|>' }}
    {%- if not turns or turns[0]['role'] != 'user' %}
        {{- raise_exception('llama3 puts the tools into the first user message: there is none') }}
    {%- endif %}
    {{- open + 'user' + close + 'Given the following functions, please respond with a JSON ' }}
    {{- 'for a function call with its proper arguments that best answers the given prompt.\\n\\n' }}
    {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument ' }}
    {{- 'name and its value}.Do not use variables.\\n\\n' }}
    {%- for tool in tools %}{{ tool | tojson(indent=4) + '\\n\\n' }}{% endfor %}
    {{- turns[0]['content'] | trim + '<|eot_id|>' }}
    {%- set turns = turns[1:] %}
{%- endif %}
{%- for message in turns %}
    {%- if 'tool_calls' in message %}
        {%- if message['tool_calls'] | length != 1 or message['content'] %}
            {{- raise_exception('llama3 writes one tool call in a turn, and no text beside it') }}
        {%- endif %}
        {%- set call = message['tool_calls'][0]['function'] %}
        {{- open + 'assistant' + close + '{"name": "' + call['name'] + '", "parameters": ' }}
        {{- call['arguments'] | tojson + '}' }}
    {%- elif message['role'] == 'tool' %}
        {{- open + 'ipython' + close + message['content'] | tojson }}
    {%- else %}
        {{- open + message['role'] + close + message['content'] | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ open + 'assistant' + close }}{% endif %}
"""

_DEEPSEEK = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- 'User: ' + message['content'] + '\\n\\n' }}
    {%- elif message['role'] == 'assistant' %}
        {{- 'Assistant: ' + message['content'] + eos_token }}
    {%- else %}
        {{- message['content'] + '\\n\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}
"""

_GEMMA = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ('user', 'assistant') %}
        {{- raise_exception('gemma has no ' + message['role'] + ' messages') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else 'user' %}
    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""

_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TEMPLATES = {
    "chatml": _Named(_NO_TOOLS.replace("NAME", "chatml") + _CHATML, ("<|im_start|>", "<|im_end|>")),
    "qwen": _Named(_QWEN, ("<|im_start|>", "<|im_end|>")),
    "llama3": _Named(_LLAMA3, _HEADERS, ("bos_token",)),
    "deepseek": _Named(
        _NO_TOOLS.replace("NAME", "deepseek") + _DEEPSEEK, (), ("bos_token", "eos_token")
    ),
    "gemma": _Named(
        _NO_TOOLS.replace("NAME", "gemma") + _GEMMA,
        ("<start_of_turn>", "<end_of_turn>"),
        ("bos_token",),
    ),
}


def apply_template(tokenizer: Any, template: str) -> None:
    """Give `tokenizer` the chat template called `template`, or the text of the file of that path.

    A name comes before a file of the same name (write ./qwen for the file).

    Errors: UserError for what is neither, for a file that is no template (with the line), and for
    a named template with marks that are not single tokens of this tokenizer: it would train the
    model on their letters.
    """
    if template in TEMPLATES:
        named = TEMPLATES[template]
        _check_marks(tokenizer, template, named)
        tokenizer.chat_template = named.text
    else:
        tokenizer.chat_template = _read(template)


def renderer(tokenizer: Any, tools: list[dict[str, Any]] | None) -> Render:
    """What turns messages into text as the tokenizer's chat template does, the date held still.

    It is what `apply_chat_template(..., tokenize=False)` gives, and several times as fast: most of
    its time goes into copying the messages. A transformers without the helper used for that (4.57
    and 5 have it) is asked directly.

    Errors: UserError without a template; the function's: UserError when the template refuses.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"tokenizer {name_of(tokenizer)} has no chat template: take an instruct model's, "
            "add a chat_template to its tokenizer_config.json, name a template "
            f"({', '.join(TEMPLATES)}, or a file), or set data.use_original_prompt=true with "
            "prompts that are already written out"
        )
    try:
        text = tokenizer.get_chat_template(tools=tools)
        compiled = _compile(text)
    except Exception as error:  # no template for this among several, or a syntax error
        raise UserError(f"chat template of {name_of(tokenizer)}: {_line(error)}") from error
    if compiled.needs_eos and not tokenizer.eos_token:
        raise UserError(
            f"chat template of {name_of(tokenizer)} writes eos_token, which the tokenizer lacks, "
            "so a turn would never end: set eos_token in its tokenizer_config.json"
        )
    if compiled.template is None:
        draw = _slow_renderer(tokenizer, text, tools)
    else:
        draw = _fast_renderer(tokenizer, compiled.template, tools)

    def render(messages: Sequence[Mapping[str, Any]], generation: bool) -> str:
        try:
            return draw(messages, generation)
        except Exception as error:  # code of somebody else: whatever it raises, it refuses
            roles = ", ".join(str(message["role"]) for message in messages)
            raise UserError(
                f"chat template of {name_of(tokenizer)} refuses the turns [{roles}]: {_line(error)}"
            ) from error

    return render


def name_of(tokenizer: Any) -> str:
    """What to call a tokenizer in a message."""
    return str(tokenizer.name_or_path or type(tokenizer).__name__)


class _Compiled(NamedTuple):
    template: Any  # jinja2.Template, or None where transformers does not compile it for us
    needs_eos: bool


def _compiler() -> Callable[[str], Any] | None:
    """What in transformers compiles a template: it makes the environment that templates expect."""
    from transformers.utils import chat_template_utils

    return getattr(chat_template_utils, "_compile_jinja_template", None)


@lru_cache(maxsize=16)
def _compile(text: str) -> _Compiled:
    from jinja2 import meta

    compiler = _compiler()
    if compiler is None:
        return _Compiled(None, "eos_token" in text)
    environment = _with_quick_dicts(compiler(text).environment)
    template = environment.from_string(text)  # ours, so that its globals may be changed
    template.globals = {**template.globals, "strftime_now": _DATE.strftime}
    return _Compiled(
        template, "eos_token" in meta.find_undeclared_variables(environment.parse(text))
    )


def _with_quick_dicts(environment: Any) -> Any:
    """The environment, reading a key of a plain dict without the sandbox's detours.

    The sandbox looks for an attribute and for a key, in one order or the other, and takes most of a
    rendering's time for it. A dict has no attributes but its methods, so for every other name both
    orders come to the key.
    """
    environment = environment.overlay()  # transformers keeps the one it has

    def quickly(otherwise: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def read(obj: Any, name: Any) -> Any:
            if type(obj) is dict and type(name) is str and name not in _METHODS:
                try:
                    return obj[name]
                except KeyError:
                    return environment.undefined(obj=obj, name=name)
            return otherwise(obj, name)

        return read

    environment.getattr = quickly(environment.getattr)
    environment.getitem = quickly(environment.getitem)
    return environment


def _fast_renderer(tokenizer: Any, template: Any, tools: list[dict[str, Any]] | None) -> Render:
    fixed = {
        **template.globals, **tokenizer.special_tokens_map, "tools": tools, "documents": None
    }  # fmt: skip

    def draw(messages: Sequence[Mapping[str, Any]], generation: bool) -> str:
        values = {**fixed, "messages": messages, "add_generation_prompt": generation}
        # what template.render does, without copying the values twice
        return "".join(template.root_render_func(template.new_context(values, shared=True)))

    return draw


def _slow_renderer(tokenizer: Any, text: str, tools: list[dict[str, Any]] | None) -> Render:
    if "strftime_now" in text:
        raise UserError(
            f"chat template of {name_of(tokenizer)} writes today's date (strftime_now), which this "
            "transformers cannot hold still: write a date into a template file instead"
        )

    def draw(messages: Sequence[Mapping[str, Any]], generation: bool) -> str:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=generation
            )
        )

    return draw


def _check_marks(tokenizer: Any, template: str, named: _Named) -> None:
    missing = [role for role in named.roles if not getattr(tokenizer, role)]
    if missing:
        raise UserError(
            f"chat template {template} writes {' and '.join(missing)}, which tokenizer "
            f"{name_of(tokenizer)} lacks: set it in its tokenizer_config.json, or take another of "
            f"{', '.join(TEMPLATES)}, or a file"
        )
    split = [mark for mark in named.marks if not _is_token(tokenizer, mark)]
    if split:
        fits = [
            name
            for name, other in TEMPLATES.items()
            if all(_is_token(tokenizer, mark) for mark in other.marks)
            and all(getattr(tokenizer, role) for role in other.roles)
        ]
        raise UserError(
            f"chat template {template}: {', '.join(split)} {'is' if len(split) == 1 else 'are'} "
            f"no single token of tokenizer {name_of(tokenizer)}: take a template whose marks it "
            f"has ({', '.join(fits) or 'none of the named ones'}, or a file), or add the tokens to "
            "the tokenizer and the model"
        )


def check_marks(tokenizer: Any, prompt: str) -> None:
    """Whether what looks like a special token in a prompt that is written out is one.

    Errors: UserError when it is not: its letters would be trained on.
    """
    marks = dict.fromkeys(_MARK.findall(prompt))
    split = [mark for mark in marks if not _is_token(tokenizer, mark)]
    if split:
        raise UserError(
            f"{', '.join(split)} of the prompt {'is' if len(split) == 1 else 'are'} no single "
            f"token of tokenizer {name_of(tokenizer)}: take the --prompt-type of its family"
        )


def _is_token(tokenizer: Any, mark: str) -> bool:
    ids = tokenizer(mark, add_special_tokens=False)["input_ids"]
    return len(ids) == 1 and tokenizer.convert_ids_to_tokens(ids)[0] == mark


def _read(template: str) -> str:
    from jinja2 import TemplateSyntaxError

    path = Path(template)
    if not path.is_file():
        raise UserError(
            f"chat template {template}: no such name or file: use one of {', '.join(TEMPLATES)}, "
            "or the path of a jinja file"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")  # a mark at its start is no text
        _compile(text)
    except TemplateSyntaxError as error:
        raise UserError(f"{path} line {error.lineno}: {_line(error)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {_line(error)}") from error
    return text


def _line(error: Exception) -> str:
    from jinja2 import TemplateSyntaxError

    text = error.message if isinstance(error, TemplateSyntaxError) else str(error)
    return " ".join(str(text).split()) or type(error).__name__
