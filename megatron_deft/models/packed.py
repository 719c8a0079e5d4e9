"""What a model is told about documents that share a row."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class PackedParams(PackedSeqParams):
    """megatron-core's PackedSeqParams, and the same facts as numbers.

    runs: (documents, length) of neighbours of equal length, in order, over all context-parallel
        ranks. TorchAttention asks in every layer, and reading cu_seqlens_q from a GPU would wait
        for it each time. TransformerEngine gets the fields of the parent class only.
    """

    runs: tuple[tuple[int, int], ...] = ()


def packed_seq_params(batch: Mapping[str, Tensor]) -> PackedParams | None:
    """The packed_seq_params argument of a GPTModel's forward, for every stage of a pipeline.

    batch: with "cu_seqlens" int32 [documents + 1] if it is packed, best on the host (elsewhere
        reading it waits, once), and "tokens", whose device the model computes on.
    returns: None for a batch of dense rows.

    Padding between documents is part of them: cu_seqlens_*_padded stay unset. The real positions of
    a document come first and see none of its padding, so the numbers are the same; and told of
    padding, TransformerEngine rules FlashAttention 2 out. Given lengths without padding alone it
    would, under context parallelism, round them down to what divides by the ranks.
    max_seqlen is the longest document, exactly. Were it the length of the whole batch,
    megatron-core would turn each document by its place in the batch and not from 0 on.
    Attention sees differences only, which stay right, but the angles are float32, and large ones
    are rounded more.
    """
    if "cu_seqlens" not in batch:
        return None
    offsets = batch["cu_seqlens"].tolist()
    lengths = [end - start for start, end in pairwise(offsets)]
    cu_seqlens = batch["cu_seqlens"].to(batch["tokens"].device, non_blocking=True)
    return PackedParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        runs=tuple((len(list(same)), length) for length, same in groupby(lengths)),
    )
