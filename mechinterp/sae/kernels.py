"""The sparse step: of the six matrix products of a dense autoencoder's step only the encoder's is done.

1. `encode` multiplies once, `choose` picks (row, feature) pairs of the product, and only their values go on. The
   choice is a set of `Entries`, sorted by row, or `Everything`: the dense reference, which the same architectures run
   on, and which is quicker where more than `DENSE` of the pairs are chosen.
2. `decode` sums decoder rows weighted by the values (one `embedding_bag`, nothing of tokens × k × d_model is made).
3. Backward. The gradient of a value is a product of two rows (the backward of `embedding_bag`'s weights). The gradient
   of either weight is a sum over the tokens that a feature is chosen for: the pairs are sorted by feature once, and a
   *forward* `embedding_bag` over tokens gives it. The gradient of a bias that is taken off the input before the
   encoder is −(gradient of b_enc) @ W_enc.
4. `top_k` is exact in two stages: the k largest of the group maxima, then the k largest inside those groups, which hold
   all of them. `batch_top_k` is exact behind a filter at `NEAR` of the last threshold.

On CUDA, Triton kernels (triton_kernels.py) take the place of the bags of steps 2 and 3.

Gao et al. 2024, "Scaling and evaluating sparse autoencoders", appendix D has sparse kernels for decoder and gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, max_pool1d

GROUP = 16  # features of a group of `top_k`
DENSE = 0.05  # share of the pairs above which dense products are quicker
NEAR = 0.9  # of the last threshold, at which `batch_top_k` filters


@dataclass(frozen=True, eq=False)
class Entries:
    """Chosen pairs, sorted by row.

    Attributes:
        index: `[entry]` feature of each.
        rows: `[entry]` row of each.
        offsets: `[batch]` number of the first entry of each row.
        n_features: of the dictionary.
    """

    index: Tensor
    rows: Tensor
    offsets: Tensor
    n_features: int

    @classmethod
    def of_rows(cls, index: Tensor, n_features: int) -> "Entries":
        """From `[batch k]` features, k in every row."""
        batch, k = index.shape
        offsets = torch.arange(0, batch * k, k, device=index.device)
        rows = torch.arange(batch, device=index.device).repeat_interleave(k, output_size=batch * k)
        return cls(index.flatten(), rows, offsets, n_features)

    @classmethod
    def of_flat(cls, flat: Tensor, batch: int, n_features: int) -> "Entries":
        """From ascending numbers row · n_features + feature."""
        rows = torch.div(flat, n_features, rounding_mode="floor")
        return cls(flat - rows * n_features, rows, _starts(rows, batch), n_features)

    @cached_property
    def by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        """In the order of features: `[entry]` the entries and their rows; `[feature]` where each feature begins."""
        ordered, order = torch.sort(self.index.int(), stable=True)
        return order, self.rows[order], _starts(ordered, self.n_features)

    def at(self, per_feature: Tensor) -> Tensor:
        """`[feature]` numbers at the pairs, in a shape that broadcasts to their values."""
        return _At.apply(per_feature, self)  # type: ignore[no-any-return]

    def decode(self, values: Tensor, weight: Tensor) -> Tensor:
        """`[batch d]` sums of the rows of `weight` `[feature d]`, weighted by the values."""
        return _Decode.apply(values, weight, self, None, None)[0]  # type: ignore[index]

    def decode_with(self, values: Tensor, weight: Tensor, also: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
        """`decode`, and beside it the sums of the rows `also` `[n]` of `weight`, weighted by `more` `[batch n]`.

        Together they make one gradient of the weight; apart, a second one of full size that is nearly all 0.
        """
        return _Decode.apply(values, weight, self, also, more)  # type: ignore[return-value]

    def between(self, values: Tensor, low: int, high: int) -> "tuple[Tensor, Entries]":
        """The pairs of features low … high − 1 alone, as a dictionary of their own."""
        inside = ((self.index >= low) & (self.index < high)).nonzero().flatten()
        rows = self.rows[inside]
        starts = _starts(rows, len(self.offsets))
        return values.index_select(0, inside), Entries(self.index[inside] - low, rows, starts, high - low)

    def fired(self, values: Tensor) -> Tensor:
        """`[feature]` bool: features with a value that is not 0."""
        found = torch.zeros(self.n_features, dtype=torch.bool, device=values.device)
        found[self.index[values != 0]] = True
        return found

    def dense(self, values: Tensor) -> Tensor:
        """`[batch feature]` values, 0 at the pairs that were not chosen."""
        made = values.new_zeros(len(self.offsets), self.n_features)
        return made.index_put((self.rows, self.index), values)

    # Sums over pairs, for `_Encode` and `_Decode`.

    def sum_by_row(self, weight: Tensor, values: Tensor) -> Tensor:
        """`[batch d]` = Σ over a row's entries of value × weight[feature]."""
        return _bag(weight, self.index, self.offsets, values)

    def sum_by_feature(self, x: Tensor, values: Tensor) -> Tensor:
        """`[feature d]` = Σ over a feature's entries of value × x[row]."""
        order, rows, starts = self.by_feature
        return _bag(x, rows, starts, values[order])

    def count_by_feature(self, values: Tensor) -> Tensor:
        """`[feature]` = Σ over a feature's entries of value."""
        # Not index_add_, which adds in another order each time on CUDA: a resumed run must end with the same bits.
        return self.sum_by_feature(values.new_ones(len(self.offsets), 1), values)[:, 0]

    def products(self, weight: Tensor, x: Tensor) -> Tensor:
        """`[entry]` = weight[feature] · x[row]."""
        if _use_triton(weight):
            from mechinterp.sae import triton_kernels

            return triton_kernels.products(weight, x, self.index, self.rows)
        backward = torch.ops.aten._embedding_bag_per_sample_weights_backward
        return backward(x.contiguous(), weight, self.index, self.offsets, self.rows, 0)


@dataclass(frozen=True)
class Everything:
    """Every pair, with the methods of `Entries`: the dense reference. Values are `[batch feature]`."""

    def at(self, per_feature: Tensor) -> Tensor:
        return per_feature

    def decode(self, values: Tensor, weight: Tensor) -> Tensor:
        return values @ weight

    def decode_with(self, values: Tensor, weight: Tensor, also: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
        return values @ weight, more @ weight.index_select(0, also)

    def between(self, values: Tensor, low: int, high: int) -> "tuple[Tensor, Everything]":
        return values[:, low:high], self

    def fired(self, values: Tensor) -> Tensor:
        return (values != 0).any(0)

    def dense(self, values: Tensor) -> Tensor:
        return values


Selection = Entries | Everything


class Encoded(NamedTuple):
    """What the encoder makes, before any non-linearity.

    Attributes:
        values: of the chosen pairs.
        selection: the chosen pairs.
        pre: `[batch feature]` the whole product, without a gradient.
        also: `[batch n]` of the features that were asked for besides, for every row; None if none were.
    """

    values: Tensor
    selection: Selection
    pre: Tensor
    also: Tensor | None


# pre `[batch feature]` -> the pairs to go on with; None for all.
Choose = Callable[[Tensor], Entries | None]


def encode(
    x: Tensor,
    centre: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    choose: Choose,
    also: Tensor | None = None,
) -> Encoded:
    """Pre-activations (x − centre) @ weightᵀ + bias at the pairs that `choose` picks.

    Args:
        x: `[batch d_in]`.
        centre: `[d_in]`, taken off the input; None for nothing.
        weight: `[feature d_in]`.
        bias: `[feature]`; None for nothing.
        choose: sees all pre-activations, without a gradient.
        also: `[n]` different features whose pre-activations are wanted for every row.
    """
    product = _product(x if centre is None else x - centre, weight, bias)
    pre = product.detach()
    chosen = choose(pre)
    if chosen is None:
        return Encoded(product, Everything(), pre, None if also is None else product.index_select(1, also))
    values, more = _Encode.apply(x, centre, weight, bias, pre, chosen, also)  # type: ignore[misc]
    return Encoded(values, chosen, pre, more)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Half precision where autocast says so; what comes of it is in the weights' precision again."""
    return torch.nn.functional.linear(x, weight, bias).to(weight.dtype)


class _Encode(torch.autograd.Function):
    """Pre-activations at entries, and of some features at every row; the product was done before."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, centre: Any, weight: Tensor, bias: Any, pre: Tensor, entries: Entries, also: Any
    ) -> Any:
        ctx.save_for_backward(x, centre, weight, also)
        ctx.entries = entries
        values = pre.view(-1).index_select(0, entries.rows * pre.shape[1] + entries.index)
        # gather, for index_select runs on one thread here
        return values, None if also is None else pre.gather(1, also.expand(len(pre), -1))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, centre, weight, also = ctx.saved_tensors
        entries, grad, more = ctx.entries, grads[0].contiguous(), grads[1]
        needs_x, needs_centre, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        to_x = to_weight = to_bias = to_centre = None
        if needs_bias or needs_centre:
            to_bias = _with_rows(entries.count_by_feature(grad), also, lambda: more.sum(0))
        if needs_centre:
            to_centre = -(to_bias @ weight)
        if needs_x:
            to_x = entries.sum_by_row(weight, grad)
            to_x = to_x if also is None else to_x + more @ weight[also]
        if needs_weight:
            read = x if centre is None else x - centre
            to_weight = _with_rows(entries.sum_by_feature(read, grad), also, lambda: more.T @ read)
        return to_x, to_centre, to_weight, to_bias if needs_bias else None, None, None, None


class _At(torch.autograd.Function):
    """Numbers of the features of entries."""

    @staticmethod
    def forward(ctx: Any, per_feature: Tensor, entries: Entries) -> Tensor:
        ctx.entries = entries
        return per_feature.index_select(0, entries.index)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.entries.count_by_feature(grads[0].contiguous()), None


class _Decode(torch.autograd.Function):
    """Σ value × weight[feature] by row; and beside it more @ weight[also], if there are any."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, entries: Entries, also: Any, more: Any) -> Any:
        ctx.save_for_backward(values, weight, also, more)
        ctx.entries = entries
        made = entries.sum_by_row(weight, values)
        return made, None if also is None else (more @ weight.index_select(0, also)).to(made.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        values, weight, also, more = ctx.saved_tensors
        entries, grad, beside = ctx.entries, grads[0].contiguous(), grads[1]
        to_values = to_weight = to_more = None
        if ctx.needs_input_grad[0]:
            to_values = entries.products(weight, grad)
        if ctx.needs_input_grad[1]:
            to_weight = _with_rows(entries.sum_by_feature(grad, values), also, lambda: more.T @ beside)
        if ctx.needs_input_grad[4]:
            to_more = beside @ weight.index_select(0, also).T
        return to_values, to_weight, None, None, to_more


def _with_rows(table: Tensor, rows: Tensor | None, more: Callable[[], Tensor]) -> Tensor:
    """A table with something added to some of its rows, each once."""
    return table if rows is None else table.index_add_(0, rows, more())


def _bag(table: Tensor, index: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """`[bag d]` sums of the rows of a table, weighted."""
    if _use_triton(table):
        from mechinterp.sae import triton_kernels

        return triton_kernels.bag(table, index, offsets, weights)
    return embedding_bag(index, table, offsets, mode="sum", per_sample_weights=weights.to(table.dtype))


def _use_triton(tensor: Tensor) -> bool:
    """Whether Triton is there (CUDA on Windows comes without it) and its kernels know this type of number."""
    known = tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return tensor.is_cuda and known and find_spec("triton") is not None


def _starts(ordered: Tensor, n: int) -> Tensor:
    """`[n]` where each number 0 … n − 1 begins in an ascending list (or would, if it is not there)."""
    return torch.searchsorted(ordered, torch.arange(n, dtype=ordered.dtype, device=ordered.device))


# ---- which pairs ---------------------------------------------------------------------------------------------------


def top_k(pre: Tensor, k: int) -> Entries:
    """The k largest of each row of `[batch feature]`, exactly."""
    return Entries.of_rows(top_k_index(pre, k), pre.shape[1])


def top_k_index(pre: Tensor, k: int) -> Tensor:
    """`[batch k]` features of the k largest of each row, in no order."""
    batch, n_features = pre.shape
    groups = n_features // GROUP
    if n_features % GROUP or k > groups // 2:
        return pre.topk(k, sorted=False).indices
    best = max_pool1d(pre[:, None], GROUP)[:, 0].topk(k, sorted=False).indices
    group = best + torch.arange(0, batch * groups, groups, device=pre.device)[:, None]
    inside = pre.view(-1, GROUP).index_select(0, group.flatten()).view(batch, k * GROUP)
    local = inside.topk(k, sorted=False).indices
    chosen = torch.div(local, GROUP, rounding_mode="floor")
    return best.gather(1, chosen) * GROUP + local - chosen * GROUP


def above(pre: Tensor, bound: Tensor) -> Entries | None:
    """The pairs above `bound` `[feature]` (or a scalar); None, for all, where they are more than `DENSE`."""
    flat = _above(pre, bound)
    return None if len(flat) > DENSE * pre.numel() else Entries.of_flat(flat, *pre.shape)


def all_above(pre: Tensor, bound: Tensor) -> Entries:
    """The pairs above `bound`, however many."""
    return Entries.of_flat(_above(pre, bound), *pre.shape)


def _above(pre: Tensor, bound: Tensor) -> Tensor:
    """`[entry]` row · n_features + feature of the pairs above a bound; also of NaN, which must not pass for "off"."""
    return (pre <= bound).logical_not_().view(-1).nonzero().flatten()


def batch_top_k(
    pre: Tensor, n: int, last: float = 0.0, gather: Callable[[Tensor], Tensor] | None = None
) -> tuple[Entries, float]:
    """The n largest positive pairs of a batch, and the smallest value among them.

    Args:
        pre: `[batch feature]`.
        n: how many; fewer where fewer are positive.
        last: threshold of the batch before, to filter by; 0 for none.
        gather: values of this process -> values of all processes; the n are then chosen among all of them (and all
            that equal the smallest of them, for no process knows which of those the others have).
    """
    flat = pre.view(-1)
    for bound in (NEAR * last, 0.0) if last > 0 else (0.0,):
        candidates = (flat > bound).nonzero().flatten()
        values = flat[candidates]
        everyone = values if gather is None else gather(values)
        if len(everyone) >= n:
            break
    if len(everyone) > n:
        threshold = everyone.topk(n, sorted=False).values.min()
        candidates, values = candidates[values >= threshold], values[values >= threshold]
        everyone = everyone[everyone >= threshold]
    if gather is None and len(values) > n:  # equal values at the threshold
        candidates = candidates[values.topk(n, sorted=False).indices].sort().values
    smallest = float(everyone.min()) if len(everyone) else 0.0
    return Entries.of_flat(candidates, *pre.shape), smallest
