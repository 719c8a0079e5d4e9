"""The commands of `convert`; light imports, so that --help is instant."""

from __future__ import annotations

import argparse
import json

from megatron_deft.errors import UserError

MADE = {
    "hf": "a Hugging Face folder",
    "nemo": "a NeMo 2 checkpoint",
    "peft": "adapters for peft and vLLM",
}
FOLDER = "a Hugging Face folder or cached model, weights, a checkpoint or a run"


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `convert import`."""
    parser.add_argument(
        "source", metavar="MODEL",
        help="config.json, safetensors, tokenizer; or context/ and weights/ of NeMo 2, where "
        "nemo://NAME is looked for in NEMO_MODELS_CACHE, NEMO_HOME/models, ~/.cache/nemo/models",
    )  # fmt: skip
    parser.add_argument(
        "--base", metavar="NAME",
        help="the model's name on the Hub, for model cards [of the cache, else the folder's name]",
    )  # fmt: skip
    _add_conversion_arguments(parser)


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `convert export`."""
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="checkpoint, run or weights")
    add(
        "--format", choices=("hf", "nemo", "peft"), default="hf",
        help="of OUT [hf: adapters are merged into their base; peft: adapters alone]",
    )  # fmt: skip
    add("--base", metavar="FOLDER", help="of adapters: where their base lies now [where it was]")
    _add_conversion_arguments(parser)


def _add_conversion_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("out", metavar="OUT", help="folder to write")
    add("--dtype", choices=("fp32", "bf16"), help="convert to it [as stored]")
    add("--overwrite", action="store_true", help="replace OUT if it exists")
    add("--no-verify", dest="verify", action="store_false", help="do not compare with the source")


def run_import(args: argparse.Namespace) -> int:
    """Convert a Hugging Face folder or a NeMo 2 checkpoint; returns 0."""
    from megatron_deft.convert.nemo_folder import is_nemo

    rest = args.out, args.dtype, args.overwrite, args.verify
    if nemo := is_nemo(args.source):
        from megatron_deft.convert.nemo import import_nemo

        import_nemo(args.source, *rest, base=args.base)
    else:
        from megatron_deft.convert.hf import import_hf

        import_hf(args.source, *rest, base=args.base)
    print(f"{args.out}: weights for model.load" + _proof(args.verify, nemo))
    return 0


def run_export(args: argparse.Namespace) -> int:
    """Convert to a Hugging Face folder or a NeMo 2 checkpoint; returns 0."""
    rest = args.out, args.dtype, args.overwrite, args.verify
    if args.format != "hf" and args.base is not None:
        raise UserError(f"--base={args.base} with --format {args.format}: no base is read; drop it")
    if args.format == "nemo":
        from megatron_deft.convert.nemo import export_nemo

        export_nemo(args.checkpoint, *rest)
    elif args.format == "peft":
        from megatron_deft.convert.peft import export_peft

        export_peft(args.checkpoint, *rest)
    else:
        from megatron_deft.convert.hf import export_hf

        export_hf(args.checkpoint, *rest, base=args.base)
    print(f"{args.out}: {MADE[args.format]}" + _proof(args.verify, args.format != "hf"))
    return 0


def _proof(verified: bool, tensors: bool) -> str:
    compared = "tensors" if tensors else "logits"
    return f", {compared} equal to the source's" if verified else ", not verified"


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `convert verify`."""
    add = parser.add_argument
    add("a", metavar="A", help=FOLDER)
    add("b", metavar="B", help="another one, of the same or the other kind")
    add(
        "--prompt", action="append", metavar="TEXT", dest="prompts",
        help="compare on this text in place of the built-in ones; may be repeated",
    )  # fmt: skip
    add(
        "--dtype", choices=("fp32", "bf16"),
        help="round all weights to it first [the coarser of the two stored]",
    )  # fmt: skip


def run_verify(args: argparse.Namespace) -> int:
    """Print the comparison; returns 0, or 1 when the models differ."""
    from megatron_deft.convert.verify import verify

    report = verify(args.a, args.b, args.prompts, args.dtype)
    width = max(map(len, report.stages))
    for stage, difference in report.stages.items():
        print(f"{stage:<{width}}  {difference:.1e}")
    print(f"{report.tensors.compared} tensors compared bit for bit")
    print(f"{report.tokens} tokens, positions up to {report.furthest}")
    if report.by_layer:
        print(
            f"every layer from equal inputs, without {report.undecided} of {report.choices} "
            "choices of experts that are too close to call; "
            f"from end to end the logits are {report.relative:.1e} apart"
        )
    print("equal" if report.ok else "\n".join(f"DIFFERENT: {fault}" for fault in report.faults))
    return 0 if report.ok else 1


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `convert inspect`."""
    add = parser.add_argument
    add("path", metavar="PATH", help=FOLDER)
    add("--tensors", action="store_true", help="list every tensor with its dtype and shape")
    add("--checksums", action="store_true", help="read every file and compare its checksum")
    add("--json", action="store_true", help="print one JSON object")


def run_inspect(args: argparse.Namespace) -> int:
    """Print what the folder is; returns 0, or 1 when it is not whole."""
    from megatron_deft.convert.inspect import describe, inspect

    found = inspect(args.path, args.checksums)
    if args.json:
        print(json.dumps(found.to_json(args.tensors), indent=2))
    else:
        print(describe(found, args.tensors))
    return 1 if found.problems else 0
