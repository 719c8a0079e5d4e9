r"""The released prompts, character by character."""

import pytest

from megatron_deft.data.prepare import figfont
from megatron_deft.data.prepare.released import MATH, MEDICAL, SUFFIX

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
FIGFONT = (
    "You are an expert at decoding Figlet Font ASCII art. When given Figlet Font text, identify "
    "the word it represents and output only that without any explanations or additional text."
)
Q = "What is {x}\\boxed{}?"  # braces are text

PROMPTS = {
    "qwen-boxed": (
        "qwen_prompt",
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{Q}\n{BOXED}<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama-base-boxed": (
        "llama_base_prompt",
        "<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful assistant."
        f"<|end_of_text|>\n<|start_header_id|>user<|end_header_id|>\n\n{Q}\n{BOXED}"
        "<|end_of_text|>\n<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "llama-base-boxed-with-bos": (
        "llama_prompt",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful "
        f"assistant.<|eot_id|>\n<|start_header_id|>user<|end_header_id|>\n\n{Q}\n{BOXED}"
        "<|eot_id|>\n<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "deepseek-math": (
        "deepseek_prompt",
        f"<\uff5cbegin\u2581of\u2581sentence\uff5c>User: {Q}\n{BOXED}\n\nAssistant:",
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_math(name: str) -> None:
    column, write = MATH[name]
    assert (column, write(Q)) == PROMPTS[name]
    assert set(MATH) == set(PROMPTS)


def test_the_instruction_of_math() -> None:
    assert SUFFIX == " Let's think step by step and output the final answer within \\boxed{}."


MEDICAL_TEXTS = {
    "llama": (
        "<|begin_of_text|><|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\n{Q}\n{BOXED}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|start_header_id|>think<|end_header_id|>\n\nhm\n\n"
        "<|start_header_id|>answer<|end_header_id|>\n\nA",
    ),
    "qwen": (PROMPTS["qwen-boxed"][1], "<|im_start|>think\nhm\n<|im_start|>answer\nA"),
    "deepseek": (
        PROMPTS["deepseek-math"][1] + "\n",
        "thinking:\n hm\n\nanswer:\n A",
    ),
}


@pytest.mark.parametrize("family", MEDICAL_TEXTS)
def test_medical(family: str) -> None:
    prompt, response = MEDICAL[family]
    assert (prompt(Q), response("hm", "A")) == MEDICAL_TEXTS[family]
    assert set(MEDICAL) == set(MEDICAL_TEXTS)


def test_figfont() -> None:
    assert (
        f"<|im_start|>system\n{FIGFONT}<|im_end|>\n<|im_start|>user\n{{question}}\n<|im_end|>\n"
        "<|im_start|>assistant\n"
    ) == figfont.QWEN_PROMPT
    assert (
        "<|begin_of_text|><|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        f"{FIGFONT}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{{question}}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ) == figfont.LLAMA_PROMPT
