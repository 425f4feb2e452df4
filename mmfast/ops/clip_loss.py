"""`clip_loss`: symmetric InfoNCE without the matrix of similarities, with torch.library registration and autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ._clip_loss import Inputs, Options, Saved, backward, forward
from ._clip_loss_plain import clip_loss_plain
from ._contrastive import as_scalar, check_features, check_ids, compute_dtype
from ._exchange import group_name, group_size, rings
from ._register import differentiable_backward, register

Teacher = tuple[Tensor, Tensor, "Tensor | float"]

REDUCTIONS = ("mean", "sum", "none")
GRAD_REDUCTIONS = ("ddp_mean", "sum")
SMALL = 1 << 20
"""Logits up to which PyTorch's own ops on the whole matrix serve: 4 MB, and a few launches. Not measured on a GPU."""


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float | None = None,
    normalize: bool = False,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    teacher: Teacher | None = None,
    teacher_weight: float = 1.0,
    reduction: str = "mean",
    group: Any = None,
    grad_reduction: str = "ddp_mean",
    return_metrics: bool = False,
) -> Any:
    """Contrastive loss of CLIP: cross entropy of the rows and of the columns of `logit_scale * image text^T`.

    The matrix never exists: memory is linear in the batch, forward and backward. On 16-bit features products are
    accumulated in float32; the loss, its statistics and the gradient of `logit_scale` are float32 always. Under
    autocast products take autocast's dtype, and gradients keep the features' own.

    Args:
        image_features: (M, D), float32, float16, bfloat16 or float64, any strides; of length 1 unless `normalize`.
        text_features: (N, D); N is M, and pair i is row i of both, unless there are ids.
        logit_scale: multiplier of the similarities (1 / temperature, not its logarithm): a number, or a tensor of shape
            () or (1,), which gets a gradient. It is not clamped.
        logit_bias: added to every logit. It cancels in both cross entropies: its gradient is 0.
        normalize: divide the rows by their lengths first, as `F.normalize` does.
        image_ids: (M,) integers. Images and texts with equal ids are positives of each other and share the target
            evenly. An image or a text without any positive is only a negative for others, and not counted in the mean.
        text_ids: (N,) integers; given with `image_ids`.
        label_smoothing: in [0, 1): this much of the target is spread over all columns, or rows.
        teacher: (image features (M, E), text features (N, E), scale) whose softmax, both ways, is the target
            (distillation). No gradient flows to it.
        teacher_weight: in [0, 1], the share of the teacher in the target; the rest is the positives'.
        reduction: "mean" is (mean over images + mean over texts) / 2; "sum" likewise; "none" is the losses of the
            images (M,) and those of the texts (N,).
        group: a torch.distributed process group, over which features are exchanged and whose whole batch the loss is
            of, the same on every rank; None: this process alone. Every rank must give as many rows.
        grad_reduction: with a group, "ddp_mean": gradients are the group's size times those of the whole batch by this
            rank's tensors, which the mean that DistributedDataParallel takes makes right; "sum": exactly those by this
            rank's rows, and for `logit_scale` this rank's part of the sum. Ranks compare their batches first; see
            MMFAST_CHECK_RANKS in the README.
        return_metrics: also return a dict of detached float32 scalars: `image_to_text_loss`, `text_to_image_loss`,
            and the shares of images and texts whose best match is right, `image_to_text_top1`, `text_to_image_top1`.

    Returns:
        A float32 scalar (float64 for float64), or what `reduction` and `return_metrics` say.

    Raises:
        TypeError: an argument is not of its type, or dtypes do not fit.
        ValueError: a shape, a device, an option or, on every rank, another rank's batch does not fit.
        BackendError: a forced backend cannot serve.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv:2103.00020;
    open_clip's ClipLoss (local_loss and gather_with_grad) with `group`, DistillClipLoss with `teacher`.
    """
    image, text = image_features, text_features
    _check(image, text, image_ids, text_ids, label_smoothing, teacher, teacher_weight, reduction, grad_reduction)
    scale = as_scalar("clip_loss", "logit_scale", logit_scale, image)
    guide: tuple[Tensor, Tensor, Tensor] | None = None
    if teacher is not None:
        guide = teacher[0].detach(), teacher[1].detach(), as_scalar("clip_loss", "teacher", teacher[2], image).detach()
    name = group_name(group)
    factor = float(group_size(group)) if grad_reduction == "ddp_mean" else 1.0
    arguments = (image, text, scale, image_ids, text_ids, guide, label_smoothing, teacher_weight, normalize)
    if not name and _plain_serves(image, text):
        losses, text_losses, totals = clip_loss_plain(*arguments, best=return_metrics)
    else:
        backends.choose("clip_loss", _facts(image, text))
        losses, text_losses, totals = _clip_loss(
            *arguments[:5], *(guide or (None,) * 3), *arguments[6:], return_metrics, compute_dtype(image), name, factor
        )
    loss: Any
    if reduction == "none":
        loss = losses, text_losses
    elif reduction == "sum":
        loss = (totals[0] + totals[1]) / 2
    else:
        loss = (totals[0] / totals[2] + totals[1] / totals[3]) / 2
    if logit_bias is not None:  # shifts every logit of a row alike: only its NaN is felt
        none = 0.0 * as_scalar("clip_loss", "logit_bias", logit_bias, image)
        loss = (losses + none, text_losses + none) if reduction == "none" else loss + none
    if not return_metrics:
        return loss
    images, texts, n_images, n_texts, image_hits, text_hits = totals.detach().to(torch.float32).unbind()
    return loss, {
        "image_to_text_loss": images / n_images,
        "text_to_image_loss": texts / n_texts,
        "image_to_text_top1": image_hits / n_images,
        "text_to_image_top1": text_hits / n_texts,
    }


def cost(image_features: Tensor, text_features: Tensor, *, backward: bool = False) -> dict[str, int]:
    """FLOPs of the matrix products, and bytes through device memory that the op cannot do without."""
    unit = 2 * image_features.shape[0] * text_features.numel()  # one product of all rows by all columns
    features = (image_features.numel() + text_features.numel()) * image_features.element_size()
    # Backward: the logits again, and a product for either side; reads both, writes both gradients.
    return {"flops": 3 * unit, "bytes": 2 * features} if backward else {"flops": unit, "bytes": features}


def _facts(image: Tensor, text: Tensor) -> backends.Facts:
    return backends.Facts(image.device, compute_dtype(image), image.shape[1], len(image), len(text))


def _plain_serves(image: Tensor, text: Tensor) -> bool:
    """Whether the whole matrix is so small, or a transform needs, that PyTorch's own ops compute it."""
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        backends.choose("clip_loss", _facts(image, text))  # refuses if a kernel is forced
        return True
    if len(image) * len(text) == 0:
        return True
    if backends.forced() is not None or len(image) * len(text) > SMALL:
        return False
    backends.choose("clip_loss", _facts(image, text)._replace(refusal=f"{len(image)} x {len(text)} logits are few"))
    return True


class ClipLossFunction(torch.autograd.Function):
    """Autograd of `clip_loss`: saves the features and a few numbers a row."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        losses, text_losses, totals, saved = _clip_loss_forward(image, text, scale, *rest[:-1])
        ctx.save_for_backward(image, text, scale, *rest[:5], *saved)
        ctx.options, ctx.factor = rest[5:-1], rest[-1]
        return losses, text_losses, totals

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        image, text, scale, image_ids, text_ids, *rest = ctx.saved_tensors
        teacher, saved = rest[:3], rest[3:]
        needs = ctx.needs_input_grad[:3]
        smoothing, weight, normalize, *_, name = ctx.options
        if torch.is_grad_enabled():  # create_graph=True: PyTorch's own ops on the whole matrix
            if name:
                raise RuntimeError("clip_loss: the gradient over a process group cannot be differentiated again")
            guide = tuple(teacher) if teacher[0] is not None else None

            def again(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
                return clip_loss_plain(image, text, scale, image_ids, text_ids, guide, smoothing, weight, normalize)

            found = differentiable_backward(again, (image, text, scale), grads, needs)
        else:
            scaled = [grad * ctx.factor for grad in grads] if ctx.factor != 1 else grads
            found = _clip_loss_backward(
                *scaled, image, text, scale, image_ids, text_ids, *teacher, saved, *ctx.options, list(needs)
            )
        return (*(grad if need else None for grad, need in zip(found, needs, strict=True)), *(None,) * 12)


# What the registered ops run. A gradient that is not wanted is empty, since a schema's results cannot be None.


class _Call(NamedTuple):
    """Arguments of the registered ops, in their order."""

    image: Tensor
    text: Tensor
    scale: Tensor
    image_ids: Tensor | None
    text_ids: Tensor | None
    teacher_image: Tensor | None
    teacher_text: Tensor | None
    teacher_scale: Tensor | None
    label_smoothing: float
    teacher_weight: float
    normalize: bool
    best: bool
    dtype: torch.dtype
    group: str

    def split(self) -> tuple[Inputs, Options]:
        """The tensors and the rest, with the backend that serves."""
        teacher = None
        if self.teacher_image is not None and self.teacher_text is not None and self.teacher_scale is not None:
            teacher = self.teacher_image, self.teacher_text, self.teacher_scale
        facts = backends.Facts(self.image.device, self.dtype, self.image.shape[1], len(self.image), len(self.text))
        backend = backends.pick("clip_loss", facts)
        inputs = Inputs(self.image, self.text, self.scale, self.image_ids, self.text_ids, teacher)
        return inputs, Options(
            self.normalize, self.label_smoothing, self.teacher_weight, self.best, self.dtype, self.group, backend
        )


def _implementation(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return forward(*_Call(*args[:-1]).split())[:3]


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    losses, text_losses, totals, saved = forward(*_Call(*args).split())
    return losses, text_losses, totals, list(saved)


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *grads, image, text, scale, image_ids, text_ids, teacher_image, teacher_text, teacher_scale, saved = args[:12]
    *options, needs = args[12:]
    call = _Call(image, text, scale, image_ids, text_ids, teacher_image, teacher_text, teacher_scale, *options)
    found = backward(tuple(grads), *call.split(), Saved(*saved), tuple(needs))
    dimage, dtext, dscale = (
        x.new_empty(0) if grad is None else grad for grad, x in zip(found, (image, text, scale), strict=True)
    )
    return dimage, dtext, dscale


def _implementation_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _forward_fake(*args[:-1])[:3]


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    call = _Call(*args)
    m, n, like = call.image.shape[0], call.text.shape[0], call.scale
    size = group_size(call.group)
    total = n * size
    has_ids, has_teacher = call.image_ids is not None, call.teacher_image is not None
    paired = has_teacher and not has_ids
    keeps = size > 1 and not rings(call.text, size)
    saved = Saved(
        image_rnorm=like.new_empty(m if call.normalize else 0),
        text_rnorm=like.new_empty(n if call.normalize else 0),
        row_max=like.new_empty(m),
        column_max=like.new_empty(total),
        row_sum=like.new_empty(m),
        column_sum=like.new_empty(total),
        row_side=like.new_empty(m),
        column_side=like.new_empty(total if has_ids else n),
        means=like.new_empty((2, call.image.shape[1]) if call.label_smoothing else 0),
        teacher_row_max=like.new_empty(m if has_teacher else 0),
        teacher_column_max=like.new_empty(total if has_teacher else 0),
        teacher_row_sum=like.new_empty(m if has_teacher else 0),
        teacher_column_sum=like.new_empty(total if has_teacher else 0),
        teacher_row_side=like.new_empty(m if paired else 0),
        teacher_column_side=like.new_empty(n if paired else 0),
        kept=call.text.new_empty((total, call.text.shape[1]) if keeps else 0, dtype=call.dtype),
        teacher_kept=call.text.new_empty(
            (total, call.teacher_text.shape[1]) if keeps and call.teacher_text is not None else 0, dtype=call.dtype
        ),
    )
    return like.new_empty(m), like.new_empty(n), like.new_empty(6), list(saved)


def _backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    image, text, scale, needs = *args[3:6], args[-1]
    dimage, dtext, dscale = (
        x.new_empty(x.shape if need else 0) for x, need in zip((image, text, scale), needs, strict=True)
    )
    return dimage, dtext, dscale


def _check(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    label_smoothing: float,
    teacher: Teacher | None,
    teacher_weight: float,
    reduction: str,
    grad_reduction: str,
) -> None:
    op = "clip_loss"
    check_features(op, image, text)
    check_ids(op, image, text, image_ids, text_ids)
    if image_ids is None and len(image) != len(text):
        raise ValueError(
            f"{op}: {len(image)} images and {len(text)} texts need image_ids and text_ids to tell which belong together"
        )
    for name, share, last in (("label_smoothing", label_smoothing, False), ("teacher_weight", teacher_weight, True)):
        if not isinstance(share, (int, float)) or isinstance(share, bool):
            raise TypeError(f"{op}: {name} must be a number, got {type(share).__name__}")
        if not (0.0 <= share < 1.0 or (last and share == 1.0)):
            raise ValueError(f"{op}: {name} must be in [0, 1{']' if last else ')'}, got {share}")
    for name, value, known in (
        ("reduction", reduction, REDUCTIONS),
        ("grad_reduction", grad_reduction, GRAD_REDUCTIONS),
    ):
        if value not in known:
            raise ValueError(f"{op}: {name} must be one of {', '.join(known)}, got {value!r}")
    if teacher is None:
        return
    if not isinstance(teacher, tuple) or len(teacher) != 3:
        raise TypeError(
            f"{op}: teacher must be a tuple (image features, text features, scale), got {type(teacher).__name__}"
        )
    check_features(f"{op}: teacher", teacher[0], teacher[1])
    if (len(teacher[0]), len(teacher[1])) != (len(image), len(text)) or teacher[0].device != image.device:
        raise ValueError(
            f"{op}: teacher must have {len(image)} images and {len(text)} texts on {image.device}, "
            f"got {len(teacher[0])} and {len(teacher[1])} on {teacher[0].device}"
        )


_TENSORS = (
    "Tensor image, Tensor text, Tensor scale, Tensor? image_ids, Tensor? text_ids, "
    "Tensor? teacher_image, Tensor? teacher_text, Tensor? teacher_scale"
)
_OPTIONS = "float label_smoothing, float teacher_weight, bool normalize, bool best, ScalarType dtype, str group"
_clip_loss = register(
    f"clip_loss({_TENSORS}, {_OPTIONS}, float factor) -> (Tensor, Tensor, Tensor)",
    _implementation,
    fake=_implementation_fake,
    autograd=ClipLossFunction.apply,
)
_clip_loss_forward = register(
    f"clip_loss_forward({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor[])", _forward, fake=_forward_fake
)
_clip_loss_backward = register(
    f"clip_loss_backward(Tensor dlosses, Tensor dtext_losses, Tensor dtotals, {_TENSORS}, Tensor[] saved, {_OPTIONS}, "
    "bool[3] needs) -> (Tensor, Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
