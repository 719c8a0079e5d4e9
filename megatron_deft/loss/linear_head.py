"""The matrix products of a language-model head in tiles: some tokens x some of the vocabulary.

Logits are made a tile at a time, reduced to sums in the forward, turned into their gradient in the
backward, and multiplied on at once into the gradients of hidden states and weight. No more of them
exists than `Plan` says. Nothing here communicates.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from megatron_deft import ops
from megatron_deft.loss.inputs import Shard
from megatron_deft.loss.statistics import Softmax, combine

# What of it is kept for the backward is one piece of more than 32 MiB, which glibc takes from the
# system and gives back at once; less would teach it to hold on to twice as much. More of fp32: a
# kept tile saves a product, and one of fp32 takes twice the time of one of 16 bits.
CPU_CHUNK_BYTES = {2: 40 * 2**20, 4: 64 * 2**20}  # by the bytes of one logit
CUDA_CHUNK_BYTES, CUDA_CHUNK_TOKENS = 2**30, 4096
CPU_TILE_TOKENS, CPU_PARTS = 512, 8
PIECE = 512  # rows
ALIGNED = 64  # elements

Span = tuple[int, int]  # from, to
Tile = tuple[Span, Span]  # rows, columns


def size_of(tile: Tile) -> int:
    """How many logits it has."""
    row, column = tile
    return (row[1] - row[0]) * (column[1] - column[0])


@dataclass(frozen=True)
class Plan:
    """How many logits exist at a time: chunk_tokens rows of them, in tiles of tokens x columns.

    A GPU computes whole rows, one tile of them: its products are at full rate from a few thousand
    tokens on, and one tile has one launch of each. A CPU computes many tokens x few columns, in the
    same memory: with few tokens its products move the weights more than they compute (64 x 151936
    takes a quarter more time than 512 x 2048), and with few columns the pieces of the weight and of
    its gradient that go with a tile are small, too.
    """

    chunk_tokens: int
    tokens: int
    columns: int

    def in_rows(self, at_once: int) -> Plan:
        """Of whole rows, in tiles of which so many exist at a time."""
        return Plan(self.chunk_tokens, max(1, self.chunk_tokens // at_once), sys.maxsize)

    def token_spans(self, tokens: int) -> list[Span]:
        """The tiles' rows."""
        return [(i, min(i + self.tokens, tokens)) for i in range(0, tokens, self.tokens)]

    def column_spans(self, columns: int) -> list[Span]:
        """The tiles' columns."""
        return [(i, min(i + self.columns, columns)) for i in range(0, columns, self.columns)]


def plan_of(
    weight: Tensor,
    tokens: int,
    chunk_tokens: int | None = None,
    softcap: float | None = None,
) -> Plan:
    """The tiles for `tokens` kept tokens and this rank's `weight` [V_local, H]."""
    columns = weight.shape[0]
    item_bytes = tile_dtype(weight).itemsize
    row_bytes = columns * item_bytes
    if chunk_tokens is None and weight.is_cuda:
        chunk_tokens = max(CUDA_CHUNK_TOKENS, CUDA_CHUNK_BYTES // row_bytes)
    elif chunk_tokens is None:
        chunk_tokens = max(1, CPU_CHUNK_BYTES[item_bytes] // row_bytes)
    if softcap is not None:  # whose derivative lies beside the logits
        chunk_tokens = max(1, chunk_tokens // 2)
    if weight.is_cuda:
        number = max(1, -(-tokens // chunk_tokens))
        return Plan(chunk_tokens, max(1, -(-tokens // number)), columns)  # tiles of one height
    part = max(1, chunk_tokens * columns // CPU_PARTS)
    height = max(1, min(tokens, max(CPU_TILE_TOKENS, part // columns)))
    # beside the tile, a product or a converted piece of the weight takes width x H
    width = max(1, min(columns, part // height, part // max(1, weight.shape[1])))
    return Plan(chunk_tokens, height, width)


@cache
def _cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions for products of this 16-bit dtype, not an emulation."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype == torch.float16 and torch.cpu._is_amx_fp16_supported()


def tile_dtype(weight: Tensor) -> torch.dtype:
    """The dtype logits and their gradient have: the weight's, or fp32 where that is faster."""
    if weight.is_cuda or _cpu_multiplies(weight.dtype):
        return weight.dtype
    return torch.float32


@dataclass(frozen=True)
class Head:
    """hidden [N, H] and weight [V_local, H] of one dtype, labels [N] int64, bias [V_local] or None.

    softcap: logits become softcap * tanh(logits / softcap) (Gemma 2), or None
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    shard: Shard
    softcap: float | None
    plan: Plan

    @property
    def rows(self) -> list[Span]:
        """The tiles' rows."""
        return self.plan.token_spans(self.hidden.shape[0])

    @property
    def columns(self) -> list[Span]:
        """Of the real vocabulary alone: padding has no logits, and no gradient."""
        return self.plan.column_spans(self.shard.valid)

    def last_chunk(self) -> list[Tile]:
        """The tiles at the end that make one chunk together; if not all, with one on its way."""
        tiles = [*itertools.product(self.rows[::-1], self.columns[::-1])]
        room = self.plan.chunk_tokens * self.weight.shape[0]
        sizes = itertools.accumulate(map(size_of, tiles))
        last = [tile for tile, size in zip(tiles, sizes, strict=True) if size <= room]
        return last[:-1] if 1 < len(last) < len(tiles) else last

    def logits(self, row: Span, column: Span) -> Tensor:
        """One tile."""
        dtype = tile_dtype(self.weight)
        columns = slice(*column)
        bias = None if self.bias is None else self.bias[columns].to(dtype)
        z = _linear(self.hidden[slice(*row)].to(dtype), self.weight[columns].to(dtype), bias)
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def sums(self, z: Tensor, row: Span, column: Span, topk: int) -> Tensor:
        """[5 + topk, N] of a tile, see `ops.reference.row_stats`."""
        if column[0] == column[1]:
            return self.no_sums(z.shape[0], topk)
        start, width = self.shard.start + column[0], column[1] - column[0]
        labels = self.labels[slice(*row)]
        return ops.row_stats(z, labels, start, width, self.shard.ignore_index, topk)

    def no_sums(self, tokens: int, topk: int) -> Tensor:
        """The sums of a shard that is all padding."""
        sums = torch.zeros(5 + topk, tokens, device=self.hidden.device)
        sums[0], sums[1], sums[5:] = -torch.inf, -1.0, -torch.inf
        return sums

    def gradient(
        self, z: Tensor, row: Span, column: Span, softmax: Softmax, coeff: Tensor
    ) -> Tensor:
        """coeff * (p_i - 1[i = y]) of a tile, written over its logits; of before the softcap.

        softmax, coeff: of the tile's tokens
        """
        factor = None
        if self.softcap is not None:
            factor = torch.addcmul(z.new_ones(()), z, z, value=-1.0 / self.softcap**2)
        z = ops.gate_grad(
            z,
            self.labels[slice(*row)],
            softmax.row_max.contiguous(),
            coeff / softmax.sum_exp,
            coeff * softmax.logp.expm1(),
            self.shard.start + column[0],
            column[1] - column[0],
            self.shard.ignore_index,
            inplace=True,
        )
        return z if factor is None else z.mul_(factor)


@dataclass
class Tiles:
    """The logits of a head, tile by tile; the last chunk stays until the backward takes it."""

    head: Head
    kept: dict[Tile, Tensor] = field(default_factory=dict)

    def sums(self, topk: int, keep: bool) -> Tensor:
        """Of every row over this shard, [5 + topk, N]: the forward."""
        head = self.head
        if not head.rows or not head.columns:
            return head.no_sums(head.hidden.shape[0], topk)
        stays = head.last_chunk() if keep else []
        # One piece of memory: small things that are made between tiles would scatter them.
        size = sum(map(size_of, stays))
        room = torch.empty(0)
        sums = []
        for row in head.rows:
            parts: list[Tensor] = []
            for column in head.columns:
                z = head.logits(row, column)
                parts.append(head.sums(z, row, column, topk))
                if len(stays) == 1 and (row, column) in stays:
                    self.kept[row, column] = z
                elif (row, column) in stays:
                    if not self.kept:
                        room = z.new_empty(size)
                    place, room = room[: z.numel()], room[z.numel() :]
                    self.kept[row, column] = place.view_as(z).copy_(z)
                del z  # before the next one is made
                if len(parts) == 16:  # tiles may be many, and their sums as large as a tile
                    parts = [combine(torch.stack(parts))]
            sums.append(combine(torch.stack(parts)))
        return torch.cat(sums, dim=1)

    def gradients(self, softmax: Softmax, coeff: Tensor, into: Gradients) -> None:
        """The backward. Kept tiles come first, so that they make room; the rest is made again."""
        rows = self.head.rows[::-1]
        for column in self.head.columns[::-1] if rows else ():  # a block without a product is empty
            block = into.block(column, len(rows))
            for row in rows:
                z = self.kept.pop((row, column), None)
                if z is None:
                    z = self.head.logits(row, column)
                of = slice(*row)
                z = self.head.gradient(z, row, column, softmax[of], coeff[of])
                into.add(self.head, z, row, column, block, first=row is rows[0])
                del z  # before the next one is made
            into.close(column, block)


@dataclass(frozen=True)
class Gradients:
    """Where the gradients of one head go; None where one is not wanted.

    hidden: [N, H] fp32 zeros; or of hidden's dtype, where one tile spans the vocabulary
    weight: [V_local, H], fp32 or 16-bit
    bias:   [V_local] fp32, zeros or what is added to
    adds:   weight holds something to add to (a main_grad); else it is uninitialised
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    adds: bool = False

    def block(self, column: Span, products: int) -> Tensor | None:
        """Where the products of a block of columns are summed: fp32, unless there is but one."""
        if self.weight is None:
            return None
        place = self.weight[slice(*column)]
        if place.dtype == torch.float32 or (products == 1 and not self.adds):
            return place
        return torch.empty_like(place, dtype=torch.float32)

    def add(
        self, head: Head, z: Tensor, row: Span, column: Span, block: Tensor | None, first: bool
    ) -> None:
        """Multiply a tile of the logits' gradient on; `first` of its block."""
        rows, columns = slice(*row), slice(*column)
        if self.hidden is not None:
            add_product(self.hidden[rows], z, head.weight[columns].to(z.dtype))
        if block is not None and self.weight is not None:
            in_place = self.adds and block.dtype == self.weight.dtype
            overwrite = first and not in_place
            add_product(block, z.t(), head.hidden[rows].to(z.dtype), overwrite)
        if self.bias is not None:
            self.bias[columns] += z.sum(0, dtype=torch.float32)

    def close(self, column: Span, block: Tensor | None) -> None:
        """After a block's last tile: bring it to its place."""
        if block is None or self.weight is None or block.dtype == self.weight.dtype:
            return
        place = self.weight[slice(*column)]
        place.copy_(block.add_(place) if self.adds else block)


def add_product(out: Tensor, a: Tensor, b: Tensor, overwrite: bool = False) -> None:
    """out += a @ b, or out = a @ b; summed in fp32 where out is fp32.

    A 16-bit `out` is always overwritten: sums that are rounded again and again lose digits.
    """
    if out.dtype != torch.float32:
        out.copy_(a @ b) if out.dtype != a.dtype else torch.mm(a, b, out=out)
    elif a.dtype == torch.float32 and (out.is_cuda or a.stride(-1) != 1):
        torch.addmm(out, a, b, beta=0 if overwrite else 1, out=out)
    elif out.is_cuda:
        beta = 0 if overwrite else 1
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=beta, out=out)
    else:
        # For the CPU torch has no product of 16-bit factors in fp32. It is added piece by piece: an
        # addition of two dtypes first makes a copy in fp32.
        product = _linear(a, b.t(), None)
        for place, piece in zip(out.split(PIECE), product.split(PIECE), strict=True):
            place.copy_(piece) if overwrite else place.add_(piece)


def _linear(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """a @ weight.t() + bias. In fp32 on the CPU by oneDNN, where torch's own choice is MKL.

    On AMD processors MKL takes a third more time for these shapes, and twice for few tokens. Its
    product with a transposed left factor is the better one, and is left to it.
    """
    if a.dtype == torch.float32 and a.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(a, weight, bias, "none", [], "")
    if a.is_cuda and weight.shape[0] % ALIGNED:
        return _linear_into_aligned_rows(a, weight, bias)
    return torch.nn.functional.linear(a, weight, bias)


def _linear_into_aligned_rows(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same, in rows that begin at multiples of 128 bytes.

    An odd vocabulary such as 50257, or the last rank's part of one, would leave the fast products
    and the kernels' wide loads to the first row alone.
    """
    width = weight.shape[0]
    out = a.new_empty(a.shape[0], -(-width // ALIGNED) * ALIGNED)[:, :width]
    if bias is None:
        return torch.mm(a, weight.t(), out=out)
    return torch.addmm(bias, a, weight.t(), out=out)
