"""context/ of a NeMo 2 checkpoint, written by NeMo itself.

io.json is a Fiddle graph of NeMo's classes by their names and signatures, with tokenizer files and
pickles beside it: only the installed NeMo knows what it will accept. Writing it by hand was
rejected for that; reading needs none of it (convert/nemo_folder.py).
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_deft.errors import UserError

INSTALL = "pip install 'nemo-toolkit[lightning,common-only]==2.7.3' nemo-run==0.11.1"
# What NeMo's configs take for granted where TransformerEngine is, and refuse where it is not.
# Fused or not, the values are the same.
UNFUSED = {
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "moe_permute_fusion": False,
    "moe_grouped_gemm": False,
}


def require_nemo() -> None:
    """Errors: UserError when NeMo 2 with its LLM collection cannot be imported."""
    try:
        from nemo.collections import llm  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--format nemo needs NeMo 2, which cannot be imported ({error}): {INSTALL} in an "
            "environment of its own"
        ) from None


def write_context(
    folder: Path,
    model: str,
    config: str,
    arguments: Mapping[str, Any],
    tokenizer: Path | None,
) -> None:
    """Write io.json, model.yaml and the tokenizer into the new `folder`.

    Args:
        folder: becomes context/.
        model, config: the class in nemo.collections.llm, and one of its module.
        arguments: of the config class; nothing is instantiated, so that none of its checks asks
            for a GPU.
        tokenizer: folder of a Hugging Face tokenizer; it is copied under its own name.
    """
    require_nemo()
    import fiddle
    from nemo import lightning
    from nemo.collections import llm
    from nemo.collections.common.tokenizers import AutoTokenizer
    from nemo.collections.llm.gpt.model.base import HAVE_TE
    from nemo.lightning.io import TrainerContext

    model_class = getattr(llm, model)
    config_class = getattr(import_module(model_class.__module__), config)  # not all are in llm
    defaults = {} if HAVE_TE else UNFUSED
    parts: dict[str, Any] = {"config": fiddle.Config(config_class, **{**defaults, **arguments})}
    if tokenizer is not None:
        parts["tokenizer"] = fiddle.Config(AutoTokenizer, str(tokenizer))
    strategy = fiddle.Config(lightning.MegatronStrategy, ckpt_save_optimizer=False)
    context: Any = TrainerContext(
        model=fiddle.Config(model_class, **parts),  # type: ignore[arg-type]
        trainer=fiddle.Config(  # type: ignore[arg-type]
            lightning.Trainer, devices=1, accelerator="cpu", strategy=strategy
        ),
        extra={},
    )
    context.io_dump(folder, yaml_attrs=["model"])
