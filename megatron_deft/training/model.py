"""The part of the model that one rank trains: its chunks, fit for megatron-core's schedules."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module

from megatron_deft.config import RunConfig
from megatron_deft.models.accelerators import obstacle_to_gradient_accumulation_fusion
from megatron_deft.models.build import build_model, transformer_config
from megatron_deft.models.families import ModelSpec
from megatron_deft.models.heads import initialize_heads
from megatron_deft.models.lora import train_adapters_alone
from megatron_deft.training.adapters import adapters_of


def build_chunks(cfg: RunConfig, spec: ModelSpec) -> list[GPTModel]:
    """This rank's blocks of layers, weights random: one, or those of a virtual pipeline.

    What the machine lacks for them, training/obstacles.py has refused.
    """
    parallel = cfg.parallel
    fusion = parallel.gradient_accumulation_fusion
    if fusion == "auto":
        fusion = not obstacle_to_gradient_accumulation_fusion()
    tcfg = transformer_config(
        spec,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        context=parallel.context,
        context_comm=parallel.context_comm,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
        virtual=parallel.chunks if parallel.chunks > 1 else None,
        account_for_embedding=parallel.account_for_embedding,
        account_for_loss=parallel.account_for_loss,
        first_stage_layers=parallel.first_stage_layers,
        last_stage_layers=parallel.last_stage_layers,
        sequence=parallel.sequence,
        dtype=cfg.model.dtype,
        fp8=cfg.model.fp8,
        gradient_accumulation_fusion=fusion,
        recompute=cfg.model.recompute,
        recompute_modules=cfg.model.recompute_modules or ("core_attn",),
        recompute_method=cfg.model.recompute_method,
        recompute_layers=cfg.model.recompute_layers or 1,
        attention_dropout=cfg.model.attention_dropout,
        hidden_dropout=cfg.model.hidden_dropout,
        mtp_layers=cfg.model.mtp_layers,
        mtp_loss_weight=cfg.model.mtp_loss_weight,
        # The loss function returns numerator and denominator; megatron-core divides the
        # gradient by the sum of denominators over micro-batches and data-parallel ranks.
        calculate_per_token_loss=True,
        deterministic=cfg.deterministic,
    )
    stages = range(parallel.chunks) if parallel.chunks > 1 else (None,)
    adapters = adapters_of(cfg)
    multiple = parallel.vocab_pad_multiple
    chunks = [
        build_model(spec, tcfg, vocab_pad_multiple=multiple, vp_stage=stage, adapters=adapters)
        for stage in stages
    ]
    if adapters is not None:
        for chunk in chunks:
            train_adapters_alone(chunk, cfg.seed)
    return chunks


def prepare_heads(cfg: RunConfig, chunks: Sequence[GPTModel], base: str, found: int) -> str:
    """Draw the heads of multi-token prediction that `base`, which has `found`, did not bring.

    returns: what is new or left out, in words; "" if nothing
    """
    wanted, what = cfg.model.mtp_layers, "heads of multi-token prediction"
    if wanted > found:
        initialize_heads(chunks, cfg.seed, first=found)
        return f"{wanted - found} of {wanted} {what} are new: {base} has {found or 'none'}"
    if found > wanted:
        left = f"{found - wanted} of {found} {what} of {base} are left out"
        return f"{left}: model.mtp_layers={wanted}"
    return ""


def wrap_chunks(cfg: RunConfig, chunks: Sequence[GPTModel]) -> list[DistributedDataParallel]:
    """The chunks with fp32 gradient buffers, reduced as configured."""
    tcfg, overlap_gather = chunks[0].config, cfg.parallel.overlap_param_gather
    # The interleaved schedule starts the gathers of a chunk on all stages together: a stage that
    # waited for them alone would hold up the others, which wait for its activations.
    align = overlap_gather and cfg.parallel.chunks > 1
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=cfg.parallel.distributed_optimizer,
        overlap_grad_reduce=cfg.parallel.overlap_grad_reduce,
        overlap_param_gather=overlap_gather,
        align_param_gather=align,
        grad_reduce_in_fp32=True,
    )
    wrapped = [
        DistributedDataParallel(
            tcfg,
            ddp_config,
            chunk if cfg.model.dtype == "fp32" else Float16Module(tcfg, chunk),
            # The backward pass ends with chunk 0: only its reduction is worth cutting up.
            disable_bucketing=number > 0,
        )
        for number, chunk in enumerate(chunks)
    ]

    @contextmanager
    def no_sync() -> Iterator[None]:
        with ExitStack() as stack:
            for chunk in wrapped:
                stack.enter_context(chunk.no_sync())
            yield

    if cfg.parallel.overlap_grad_reduce:
        tcfg.no_sync_func = no_sync
    if align:
        tcfg.param_sync_func = [chunk.start_param_sync for chunk in wrapped]
    return wrapped


def complete_parameters(cfg: RunConfig, wrapped: Sequence[DistributedDataParallel]) -> None:
    """Gather now what the next forward pass would gather on its way: before parameters are read."""
    if cfg.parallel.overlap_param_gather:
        for chunk in wrapped:
            chunk.start_param_sync(force_sync=True)
