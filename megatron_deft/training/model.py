"""The part of the model that one rank trains: its chunks, fit for megatron-core's schedules."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module

from megatron_deft.config import RunConfig
from megatron_deft.models.build import build_model, transformer_config
from megatron_deft.models.families import ModelSpec


def build_chunks(cfg: RunConfig, spec: ModelSpec) -> list[GPTModel]:
    """This rank's blocks of layers, weights random: one, or those of a virtual pipeline."""
    parallel = cfg.parallel
    tcfg = transformer_config(
        spec,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        context=parallel.context,
        expert=parallel.expert,
        virtual=parallel.chunks if parallel.chunks > 1 else None,
        sequence=parallel.sequence,
        dtype=cfg.model.dtype,
        recompute=cfg.model.recompute,
        attention_dropout=cfg.model.attention_dropout,
        hidden_dropout=cfg.model.hidden_dropout,
        # The loss function returns numerator and denominator; megatron-core divides the
        # gradient by the sum of denominators over micro-batches and data-parallel ranks.
        calculate_per_token_loss=True,
    )
    stages = range(parallel.chunks) if parallel.chunks > 1 else (None,)
    return [
        build_model(spec, tcfg, vocab_pad_multiple=parallel.vocab_pad_multiple, vp_stage=stage)
        for stage in stages
    ]


def wrap_chunks(cfg: RunConfig, chunks: Sequence[GPTModel]) -> list[DistributedDataParallel]:
    """The chunks with fp32 gradient buffers, reduced as configured."""
    tcfg = chunks[0].config
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=cfg.parallel.distributed_optimizer,
        overlap_grad_reduce=cfg.parallel.overlap_grad_reduce,
        grad_reduce_in_fp32=True,
    )
    wrapped = [
        DistributedDataParallel(
            tcfg,
            ddp_config,
            Float16Module(tcfg, chunk) if cfg.model.dtype == "bf16" else chunk,
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
    return wrapped
