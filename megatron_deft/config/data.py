"""What a run is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_deft.config.section import Section
from megatron_deft.config.values import (
    ABOVE_0,
    ABOVE_0_EACH,
    AT_LEAST_0,
    AT_LEAST_1,
    NAMES,
    NOT_EMPTY,
    key,
)
from megatron_deft.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """What is trained on and how rows become tokens."""

    path: ClassVar[str] = "data."
    train_sets: tuple[str, ...] = key(
        "training data that `megatron-deft prepare` tokenised: folders; or, for pretraining, what "
        "stands before .bin and .idx of megatron-core's indexed datasets", (), NAMES
    )  # fmt: skip
    train_weights: tuple[float, ...] = key(
        "share of each of train_sets in what is trained on, of any sum; empty: every sample once "
        "an epoch, whichever set it is in", (), ABOVE_0_EACH
    )  # fmt: skip
    val_sets: tuple[str, ...] = key("validation data, likewise", (), NAMES)
    split: tuple[float, float] | None = key(
        "pretraining: shares of each set's documents to train and to validate on; null: all of "
        "train_sets to train on", None, ABOVE_0
    )  # fmt: skip
    train_files: tuple[str, ...] = key(
        "training files, parquet or JSONL, in the place of train_sets; they are tokenised when the "
        "run starts, into run_dir/data", (), NAMES
    )  # fmt: skip
    val_files: tuple[str, ...] = key("validation files, likewise", (), NAMES)
    format: Literal["auto", "columns", "messages"] = key(
        "rows of files hold a prompt and a response column, or a list of chat messages", "auto"
    )
    prompt_key: str = key("column of the prompt", "extra_info", NOT_EMPTY)
    response_key: str = key("column of the response", "extra_info", NOT_EMPTY)
    prompt_dict_keys: tuple[str, ...] = key(
        "keys to follow inside the prompt column; null: the column is text", ("question",)
    )
    response_dict_keys: tuple[str, ...] = key(
        "keys to follow inside the response column; null: the column is text", ("answer",)
    )
    messages_key: str = key("column of the chat messages (format messages)", "messages", NOT_EMPTY)
    tools_key: str = key(
        "column of the tools that the messages may call, where there is one", "tools", NOT_EMPTY
    )
    template: str | None = key(
        "chat template of files: chatml, llama3, qwen, deepseek, gemma, or a file; null: the "
        "tokenizer's own. It becomes that of the trained model", None, NOT_EMPTY
    )  # fmt: skip
    max_length: int = key(
        "longest sample in tokens, prompt and response together; with pack=true also how many "
        "positions a row has, and in pretraining how many it always has", 2048, AT_LEAST_1
    )  # fmt: skip
    truncation: Literal["right", "error", "drop"] = key(
        "a longer sample of files is cut at its end, stops the run, or is left out", "right"
    )
    bad_rows: Literal["error", "drop"] = key(
        "a row of files that is broken (no JSON, null content, roles out of order, ...) stops the "
        "run, or is left out and counted", "error"
    )  # fmt: skip
    use_original_prompt: bool = key("the prompt is whole as it is: apply no chat template", False)
    pack: bool = key(
        "put samples together into rows of max_length, so that hardly any position is padding; no "
        "sample sees another. train.global_batch and micro_batch then count rows", False
    )  # fmt: skip
    show_sample: bool = key("print the first sample with its trained tokens marked", True)
    shuffle: bool = key("a new order each epoch, drawn from seed", True)
    val_max_samples: int | None = key(
        "validate on the first so many samples, or rows of running text; null: all",
        None,
        AT_LEAST_1,
    )
    workers: int = key(
        "processes of each rank that read ahead; 0: the rank reads for itself, which is fast "
        "enough for any disk that is not", 0, AT_LEAST_0
    )  # fmt: skip
    prepare_workers: int | None = key(
        "processes that tokenise train_files; null: as many as there are cores", None, AT_LEAST_1
    )

    def __post_init__(self) -> None:
        """Sets or files, and what goes with each."""
        super().__post_init__()
        for sets, files in (("train_sets", "train_files"), ("val_sets", "val_files")):
            if getattr(self, sets) and getattr(self, files):
                raise UserError(
                    f"data.{sets} and data.{files} are both set: `megatron-deft prepare` makes a "
                    "set of files; name sets alone, or files alone"
                )
        if self.train_weights and len(self.train_weights) != len(self.train_sets):
            raise UserError(
                f"data.train_weights={list(self.train_weights)}: expected one number for each of "
                f"the {len(self.train_sets)} data.train_sets"
            )
        if self.split is None:
            return
        for name in ("train_files", "val_sets", "val_files"):
            if getattr(self, name):
                raise UserError(
                    f"data.split={list(self.split)} and data.{name} exclude each other: it cuts "
                    "validation data off data.train_sets; set one of them to null"
                )
