"""The training loss: cross-entropy at labelled positions only, a chunk of positions at a time.

Logits of a whole batch are the largest tensor of a fine-tuning step: (B, T, V) with V above 100,000. Only labelled
positions need them, and of these only one chunk at a time, because the gradient with respect to the hidden states can
be taken in the forward pass, chunk by chunk, when the output head itself is frozen.

Letters: B rows, T tokens, D model width, V vocabulary, N labelled positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qmemtune.adapters.queryable import has_means
from qmemtune.data.rows import IGNORED
from qmemtune.data.targets import shifted_targets
from qmemtune.engine.compiling import compiled as compile_decoder
from qmemtune.engine.fused.devices import kernels_for
from qmemtune.engine.replacing import replaced
from qmemtune.models.head import Transform, contiguous_input, decoder_of, find_transform, unchanged

CHUNK = 1024
"""Labelled positions whose logits exist at one time."""
BUFFER_BYTES = 60 * 2**20
"""Most that the logits of one chunk behind a plain head would take in float32: few enough rows to stay near the
processor's cache, enough to make the products with the head's weight, which is read anew for each chunk, worth it. In
bfloat16 it is half, for which glibc keeps a place: what is above its 32 MiB comes page by page from the system, each
time, which took up to a sixth of a head's time."""
GPU_BUFFER_BYTES = 256 * 2**20
"""The same on a GPU, in the type of the hidden states: a thousand rows of Llama 3's 128,256 words, in bfloat16."""
PART_BYTES = 8 * 2**20
"""Most that the float32 numbers of a part of a chunk take, between logits and gradient of another type."""
EVEN = 32
"""Chunks have a multiple of so many rows, save for the last: a shape is met again, and its kernel with it."""
MEASURING_PASSES = 2
"""Training passes after which a memory knows the means of its inputs: one measures them, the next finds them there."""


LossOf = Callable[[Tensor, Tensor, int], Tensor]
"""Sum of the losses of some positions, from their logits (n, V) in fp32, their targets (n,), and how many labelled
positions of the batch come before them."""


def cross_entropy(logits: Tensor, targets: Tensor, start: int) -> Tensor:
    """A :data:`LossOf` against the rows' own tokens."""
    return F.cross_entropy(logits, targets, reduction="sum")


def summed_loss(hidden_ND: Tensor, targets_N: Tensor, logits_of: Callable[[Tensor], Tensor], loss_of: LossOf) -> Tensor:
    """Sum of the losses at N positions, fp32 scalar; keeps the graph of all logits."""
    total, start = hidden_ND.new_zeros((), dtype=torch.float32), 0
    for hidden, targets in zip(hidden_ND.split(CHUNK), targets_N.split(CHUNK), strict=True):
        total = total + loss_of(logits_of(hidden).float(), targets, start)
        start += len(hidden)
    return total


class FrozenHeadLoss(torch.autograd.Function):
    """:func:`summed_loss` behind a frozen head: keeps one gradient (N, D) instead of logits (N, V)."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, targets_N: Tensor, logits_of: Callable[[Tensor], Tensor], loss_of: LossOf
    ) -> Tensor:
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        gradient_ND = torch.empty_like(hidden_ND)
        start = 0
        for hidden, targets in zip(hidden_ND.split(CHUNK), targets_N.split(CHUNK), strict=True):
            with torch.enable_grad():
                hidden = hidden.detach().requires_grad_()
                loss = loss_of(logits_of(hidden).float(), targets, start)
            gradient_ND[start : start + len(hidden)] = torch.autograd.grad(loss, hidden)[0]
            start += len(hidden)
            total += loss.detach()
        ctx.save_for_backward(gradient_ND)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return (gradient_ND * grads[0]).to(gradient_ND.dtype), None, None, None


class PlainHeadLoss(torch.autograd.Function):
    """:class:`FrozenHeadLoss` of :func:`cross_entropy` behind a linear head, in buffers that every chunk uses again.

    Logits, their probabilities and the gradient take turns in one buffer, so no chunk needs fresh memory, and a chunk
    passes from the processor's cache to memory half as often: 800 positions of 49,152 words, one AMX core, 250 ms
    against 465 ms. On a GPU one kernel makes losses and gradient of a chunk, in place.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, targets_N: Tensor, weight_VD: Tensor, bias_V: Tensor | None, on_gpu: bool
    ) -> Tensor:
        buffer = GPU_BUFFER_BYTES // hidden_ND.dtype.itemsize if on_gpu else BUFFER_BYTES // 4
        rows = chunk_of(len(hidden_ND), max(1, buffer // len(weight_VD)))
        low = hidden_ND.new_empty(rows, len(weight_VD))
        kernels = kernels_for(hidden_ND)
        # The second case is a GPU's step that is traced on tensors without numbers.
        in_place = kernels is not None or (on_gpu and not hidden_ND.is_cuda) or low.dtype == torch.float32
        part = rows if in_place else min(rows, max(1, PART_BYTES // (4 * len(weight_VD))))
        wide = None if in_place else low.new_empty(part, len(weight_VD), dtype=torch.float32)
        gradient_ND = torch.empty_like(hidden_ND)
        losses_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)
        start = 0
        for hidden, targets in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True):
            end = start + len(hidden)
            raw, losses = low[: len(hidden)], losses_N[start:end]
            if bias_V is None:
                torch.mm(hidden, weight_VD.t(), out=raw)
            else:
                torch.addmm(bias_V, hidden, weight_VD.t(), out=raw)
            if kernels is not None:
                losses.copy_(kernels.cross_entropy_(raw, targets).neg_())
            else:
                for some in zip(raw.split(part), targets.split(part), losses.split(part), strict=True):
                    to_gradient_(*some, wide)
            torch.mm(raw, weight_VD, out=gradient_ND[start:end])
            start = end
        ctx.save_for_backward(gradient_ND)
        return -losses_N.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *FrozenHeadLoss.backward(ctx, *grads), None, None


def chunk_of(positions: int, most: int) -> int:
    """Rows of a chunk: of as few and as even chunks of at most ``most`` rows as there can be."""
    chunks = -(-positions // most)
    even = -(-positions // chunks)
    return min(-(-even // EVEN) * EVEN, most, positions)


def to_gradient_(logits: Tensor, targets: Tensor, log_chances: Tensor, wide: Tensor | None) -> None:
    """Turn logits into the gradient of :func:`cross_entropy` with respect to them, in place.

    Args:
        logits: (n, V).
        targets: (n,).
        log_chances: (n,) float32; becomes what the targets' losses are the negative of.
        wide: at least (n, V) float32, to compute in; None where the logits themselves are for it.
    """
    found, target = logits if wide is None else wide[: len(logits)].copy_(logits), targets[:, None]
    torch.log_softmax(found, dim=-1, out=found)
    log_chances.copy_(found.gather(1, target)[:, 0])
    found.exp_().scatter_add_(1, target, found.new_full((len(found), 1), -1.0))
    if wide is not None:
        logits.copy_(found)


def has_plain_head(head: nn.Module, transform: Transform, hidden: Tensor) -> bool:
    """Whether logits are one linear product of the head's own, computed in the type of the hidden states."""
    device = hidden.device.type
    return (
        transform is unchanged
        and type(head) is nn.Linear
        and "forward" not in head.__dict__
        and all(hook is contiguous_input for hook in head._forward_pre_hooks.values())
        and not head._forward_hooks
        and head.weight.dtype == hidden.dtype
        and head.weight.device == hidden.device
        and (not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) == hidden.dtype)
    )


def frozen_head_loss(
    hidden_ND: Tensor,
    targets_N: Tensor,
    head: nn.Module,
    transform: Transform,
    loss_of: LossOf = cross_entropy,
    *,
    on_gpu: bool | None = None,
) -> Tensor:
    """Sum of the losses at N positions behind a frozen head, fp32 scalar; keeps one gradient (N, D).

    Args:
        head: output head, (N, D) to (N, V).
        transform: what the model does to the head's output.
        on_gpu: whether to take as much memory as on a GPU; if not given, where the hidden states are.
    """
    if loss_of is cross_entropy and has_plain_head(head, transform, hidden_ND):
        plain: Tensor = PlainHeadLoss.apply(
            hidden_ND, targets_N, head.weight, head.bias, hidden_ND.is_cuda if on_gpu is None else on_gpu
        )
        return plain
    loss: Tensor = FrozenHeadLoss.apply(hidden_ND, targets_N, lambda chunk: transform(head(chunk)), loss_of)
    return loss


class LabelledLoss:
    """Turns one forward pass of an adapted causal language model into its summed loss.

    While :meth:`installed`, the PEFT model returns ``(loss_sum, auxiliary)`` instead of logits. The call still enters
    through the outermost module, so that data-parallel wrappers, autocast and adapter hooks see it.

    Args:
        model: a PEFT model around a causal language model.
        auxiliary: called after the forward pass of the base model: a loss term of the adapter, or None.
        loss_of: the loss of labelled positions.
        compiled: compile the decoder; only for models whose way from hidden states to logits is known.
    """

    def __init__(
        self,
        model: nn.Module,
        auxiliary: Callable[[], Tensor | None] = lambda: None,
        loss_of: LossOf = cross_entropy,
        *,
        compiled: bool = False,
    ) -> None:
        self.loss_of = loss_of
        self.tuner: nn.Module = model.base_model  # type: ignore[assignment]
        self.lm: nn.Module = model.get_base_model()  # type: ignore[operator]
        self.auxiliary = auxiliary
        self.transform = find_transform(self.lm)
        self.compiled = compile_decoder(decoder_of(self.lm)) if compiled else None
        self._measuring = MEASURING_PASSES if has_means(model) else 0
        """Passes to come in which a memory measures its inputs."""

    @property
    def full_logits(self) -> bool:
        """Whether the model's way from hidden states to logits is not known, so that it must compute all of them."""
        return self.transform is None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace what the model returns while the block runs."""
        lm_forward, tuner_forward = self.lm.forward, self.tuner.forward

        def loss_sum(labels: Tensor, **inputs: Any) -> Tensor:
            return self._loss_sum(lm_forward, labels, inputs)

        def with_auxiliary(*args: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
            total = tuner_forward(*args, **inputs)
            # An adapter's term is complete only when the base model's forward has ended.
            term = self.auxiliary()
            return total, total.new_zeros(()) if term is None else term

        with replaced(self.lm, forward=loss_sum), replaced(self.tuner, forward=with_auxiliary):
            yield

    def _loss_sum(self, lm_forward: Callable[..., Any], labels: Tensor, inputs: dict[str, Any]) -> Tensor:
        targets = shifted_targets(labels)
        labelled = targets != IGNORED
        inputs = {name: value for name, value in inputs.items() if value is not None}
        inputs.update(use_cache=False, return_dict=True)
        if self.transform is None:
            logits = lm_forward(**inputs).logits
            return summed_loss(logits[labelled], targets[labelled], lambda chunk: chunk, self.loss_of)
        return self._from_hidden(inputs, labelled, targets)

    def _from_hidden(self, inputs: dict[str, Any], labelled: Tensor, targets: Tensor) -> Tensor:
        head, transform = self.lm.get_output_embeddings(), self.transform  # type: ignore[operator]
        assert transform is not None
        decoder: Callable[..., Any] = decoder_of(self.lm)
        if self.compiled is not None and torch.is_grad_enabled():
            # What a graph cannot hold would keep the decoder from being compiled for good.
            decoder = self.compiled if self._measuring == 0 else decoder
            self._measuring = max(self._measuring - 1, 0)
        # Looked up before the decoder runs: how many there are is waited for, on a GPU with all that runs until then.
        places = labelled.nonzero(as_tuple=True)
        hidden, targets = decoder(**inputs)[0][places], targets[places]

        def logits_of(chunk: Tensor) -> Tensor:
            return transform(head(chunk))

        if len(hidden) == 0:
            # Keeps the graph whole: a batch without labels must reach every parameter, with gradient zero.
            return hidden.sum().float()
        if torch.is_grad_enabled() and not any(p.requires_grad for p in head.parameters()):
            return frozen_head_loss(hidden, targets, head, transform, self.loss_of)
        return summed_loss(hidden, targets, logits_of, self.loss_of)
