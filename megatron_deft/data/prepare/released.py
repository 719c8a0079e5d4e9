r"""The releases' names and strings: data sets of the Hub, instructions, and prompts written out.

The prompts have their special tokens spelt, for data.use_original_prompt: two families' frames, and
what each data set puts into them. The differences between them are the releases' own: figfont's
user turn ends with a line end, medical's and figfont's Llama prompts have two begin_of_text, math's
Llama prompts a line end after every turn, and medical's DeepSeek prompt one at the end.
"""

from collections.abc import Callable

NUMINA = "AI-MO/NuminaMath-CoT"
NUMINA_SUBSET = "gaotang/numina-cot-subset-67k"
LIGHTEVAL = "DigitalLearningGmbH/MATH-lighteval"
M23K = "UCSC-VLAA/m23k-tokenized"
M23K_PROCESSED = "gaotang/medical_sft_processed"

# After the problem, in the user turn of a math row.
SUFFIX = " Let's think step by step and output the final answer within \\boxed{}."
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
ASSISTANT = "You are a helpful assistant."
KNOWLEDGE = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
LLAMA_BOS = "<|begin_of_text|>"


def qwen(system: str, user: str) -> str:
    """One system and one user turn as Qwen writes them, and the opening of the answer."""
    return (
        f"<|im_start|>system\n{system}<|im_end|>\n"
        f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    )


def llama(system: str, user: str, end: str = "<|eot_id|>") -> str:
    """One system and one user turn as Llama 3 writes them, each closed by `end`; no bos."""
    return (
        f"<|start_header_id|>system<|end_header_id|>\n\n{system}{end}"
        f"<|start_header_id|>user<|end_header_id|>\n\n{user}{end}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def deepseek(user: str) -> str:
    """One user turn as DeepSeek-Math writes it."""
    return f"<｜begin▁of▁sentence｜>User: {user}\n\nAssistant:"  # noqa: RUF001


# Name -> (column, prompt of a problem). The names are those of the released evaluation.
MATH: dict[str, tuple[str, Callable[[str], str]]] = {
    "qwen-boxed": ("qwen_prompt", lambda q: qwen(ASSISTANT, f"{q}\n{BOXED}")),
    "llama-base-boxed": (
        "llama_base_prompt",
        lambda q: llama(ASSISTANT, f"{q}\n{BOXED}", "<|end_of_text|>\n"),
    ),
    "llama-base-boxed-with-bos": (
        "llama_prompt",
        lambda q: LLAMA_BOS + llama(ASSISTANT, f"{q}\n{BOXED}", "<|eot_id|>\n"),
    ),
    "deepseek-math": ("deepseek_prompt", lambda q: deepseek(f"{q}\n{BOXED}")),
}

# Family -> prompt of a question, and what stands before the thoughts and before the answer.
MEDICAL: dict[str, tuple[Callable[[str], str], Callable[[str, str], str]]] = {
    "llama": (
        lambda q: 2 * LLAMA_BOS + llama(KNOWLEDGE, f"{q}\n{BOXED}"),
        lambda thinking, answer: (
            f"<|start_header_id|>think<|end_header_id|>\n\n{thinking}\n\n"
            f"<|start_header_id|>answer<|end_header_id|>\n\n{answer}"
        ),
    ),
    "qwen": (
        lambda q: qwen(ASSISTANT, f"{q}\n{BOXED}"),
        lambda thinking, answer: f"<|im_start|>think\n{thinking}\n<|im_start|>answer\n{answer}",
    ),
    "deepseek": (
        lambda q: deepseek(f"{q}\n{BOXED}") + "\n",
        lambda thinking, answer: f"thinking:\n {thinking}\n\nanswer:\n {answer}",
    ),
}
