"""From a question to the text before its answer, special tokens written out."""

from typing import Any

from megatron_deft.data.templates import check_marks, name_of, renderer
from megatron_deft.errors import UserError
from megatron_deft.evaluation.task import Question, Task

QUESTION = "{question}"  # what stands for it in a prompt that is written out


def template_of(task: Task, prompt_type: str | None) -> tuple[str, str | None]:
    """The name and the text of a prompt type (None: the task's first).

    Errors: UserError for a name that is none, listing those there are.
    """
    name = next(iter(task.prompts)) if prompt_type is None else prompt_type
    if name not in task.prompts:
        raise UserError(f"prompt_type={name}: one of {', '.join(task.prompts)} is needed")
    return name, task.prompts[name]


def render_prompt(tokenizer: Any, question: Question, template: str | None) -> str:
    """The text before the answer: the template with the question, or through the chat template.

    The latter is what training puts before the first trained token of the same conversation.

    Errors: UserError without a chat template, and where it refuses the conversation.
    """
    if template is None:
        if not tokenizer.chat_template:
            raise UserError(
                f"tokenizer {name_of(tokenizer)} has no chat template, as base models have none: "
                "pass the --prompt-type of its family (a wrong name lists them)"
            )
        return renderer(tokenizer, None)(question.messages, True)
    return template.replace(QUESTION, question.text)


def check_prompt(tokenizer: Any, template: str | None) -> None:
    """Whether the special tokens of a prompt that is written out are some of this tokenizer.

    Errors: UserError where they are not: it is the prompt of another family.
    """
    if template is not None:
        check_marks(tokenizer, template)
