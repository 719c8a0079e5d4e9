"""Tasks of lm-eval that the tests make: YAML files with their questions beside them, and a second
computation of their scores.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.evaluation.conftest import WORDS

QUESTIONS = [f"What word does this say?\n\n{word}\n" for word in [*WORDS, "X"]]
CHOICES = [random.Random(index).sample(WORDS, 3) for index in range(len(QUESTIONS))]


def choice_task(folder: Path, name: str, answers: list[int], **more: Any) -> Path:
    """A multiple-choice task of so many questions."""
    data = folder / f"{name}.jsonl"
    data.write_text(
        "\n".join(
            json.dumps({"question": question, "answer": answer, "choices": choices})
            for question, answer, choices in zip(QUESTIONS, answers, CHOICES, strict=False)
        )
    )
    return write_task(
        folder, name, data,
        output_type="multiple_choice", doc_to_text="{{question}}", doc_to_target="answer",
        doc_to_choice="choices", metric_list=[metric("acc"), metric("acc_norm")], **more,
    )  # fmt: skip


def metric(name: str, **more: Any) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True, **more}


def write_task(folder: Path, name: str, data: Path, **config: Any) -> Path:
    file = folder / f"{name}.yaml"
    source = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "metadata": {"version": 1.0},
    }  # fmt: skip
    file.write_text(yaml.safe_dump(source | config))
    return file


def write_tasks(folder: Path) -> None:
    """Multiple choice (12 and 4 questions), generation, perplexity, and groups of the first two."""
    choice_task(folder, "tiny_long", [0, 1, 2] * 4)
    choice_task(folder, "tiny_short", [2, 2, 1, 0], num_fewshot=0)
    data = folder / "tiny_long.jsonl"
    write_task(
        folder, "tiny_words", data, output_type="generate_until",
        doc_to_text="{{question}}", doc_to_target="{{['CAT', 'DOG', 'x'][answer]}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 3, "do_sample": False},
        metric_list=[metric("exact_match", ignore_case=True)],
    )  # fmt: skip
    write_task(
        folder, "tiny_texts", data, output_type="loglikelihood_rolling",
        doc_to_text="", doc_to_target="{{question}}",
        metric_list=[{
            "metric": "word_perplexity", "aggregation": "weighted_perplexity",
            "higher_is_better": False,
        }],
    )  # fmt: skip
    for weighted in (True, False):
        group = {
            "group": f"tiny_{'weighted' if weighted else 'even'}",
            "task": ["tiny_long", "tiny_short"],
            "aggregate_metric_list": [
                {"metric": "acc", "aggregation": "mean", "weight_by_size": weighted}
            ],
        }
        (folder / f"{group['group']}.yaml").write_text(yaml.safe_dump(group))
    plain = {"group": "tiny_plain", "task": ["tiny_long", "tiny_short"]}
    (folder / "tiny_plain.yaml").write_text(yaml.safe_dump(plain))


@torch.inference_mode()
def expected_correct(
    folder: Path, answers: list[int], normalised: bool, chat: bool = False
) -> list[float]:
    """Whether the right choice is the likeliest, computed with the model alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    correct = []
    for question, answer, choices in zip(QUESTIONS, answers, CHOICES, strict=False):
        scores = []
        for choice in choices:
            # As lm-eval cuts: a context's outer white space goes to the continuation.
            context, rest = question.rstrip(), question[len(question.rstrip()) :] + " "
            if chat:
                turns = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
                context, rest = turns.rstrip(), "\n"
            whole = tokenizer(context + rest + choice)["input_ids"]
            cut = len(tokenizer(context)["input_ids"])
            logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            taken = logits[torch.arange(cut - 1, len(whole) - 1), whole[cut:]].sum().item()
            scores.append(taken / len(choice) if normalised else taken)
        correct.append(float(int(np.argmax(scores)) == answer))
    return correct
