"""`siglip_loss`: the sigmoid loss without the matrix of similarities, with torch.library registration and autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ._contrastive import as_scalar, check_features, check_ids, compute_dtype
from ._exchange import group_name, group_size
from ._register import differentiable_backward, register
from ._siglip_loss import Inputs, Options, Result, forward
from ._siglip_loss_plain import siglip_loss_plain

REDUCTIONS = ("mean", "sum")
GRAD_REDUCTIONS = ("ddp_mean", "sum")
METRICS = ("positive_loss", "negative_loss", "positive_accuracy", "negative_accuracy")
SMALL = 1 << 20
"""Logits up to which PyTorch's own ops on the whole matrix serve: 4 MB, and a few launches. Not measured on a GPU."""


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    *,
    normalize: bool = False,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    reduction: str = "mean",
    group: Any = None,
    grad_reduction: str = "ddp_mean",
    return_metrics: bool = False,
) -> Any:
    """Sigmoid loss of SigLIP: each image beside each text is a decision of its own.

    `-sum_ij logsigmoid(y_ij (logit_scale <image_i, text_j> + logit_bias)) / M`, with y_ij = 1 for positives, -1 else.
    The matrix never exists: memory is linear in the batch. Where a gradient will be asked for, the forward pass makes
    all of them in its one pass over the logits, and keeps them in float32 for the backward pass. On 16-bit features
    products are accumulated in float32; the loss and the gradients of scale and bias are float32 always. Under autocast
    products take autocast's dtype, and gradients keep the features' own.

    Args:
        image_features: (M, D), float32, float16, bfloat16 or float64, any strides; of length 1 unless `normalize`.
        text_features: (N, D); N is M, and pair i is row i of both, unless there are ids.
        logit_scale: multiplier of the similarities (not its logarithm): a number, or a tensor of shape () or (1,),
            which gets a gradient. It is not clamped.
        logit_bias: added to every logit, likewise; None is 0.
        normalize: divide the rows by their lengths first, as `F.normalize` does.
        image_ids: (M,) integers. Images and texts with equal ids are positives, however many.
        text_ids: (N,) integers; given with `image_ids`.
        reduction: "mean" divides the sum by the number of images M, "sum" does not. (Losses of single images are not
            to be had: their gradients could not be made before what comes from the loss is known.)
        group: a torch.distributed process group, over which features are exchanged and whose whole batch the loss is
            of, the same on every rank; None: this process alone. Every rank must give as many rows.
        grad_reduction: with a group, "ddp_mean": gradients are the group's size times those of the whole batch by this
            rank's tensors, which the mean that DistributedDataParallel takes makes right; "sum": exactly those by this
            rank's rows, and for `logit_scale` and `logit_bias` this rank's part of the sum.
        return_metrics: also return a dict of detached float32 scalars: `positive_loss` and `negative_loss`, which add
            up to the mean loss, `positive_accuracy`, the share of positives with a logit above 0, and
            `negative_accuracy`, the share of other pairs with a logit below 0.

    Returns:
        A float32 scalar (float64 for float64), or that and the metrics.

    Raises:
        TypeError: an argument is not of its type, or dtypes do not fit.
        ValueError: a shape, a device, an option or, on every rank, another rank's batch does not fit.
        BackendError: a forced backend cannot serve.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", arXiv:2303.15343; open_clip's SigLipLoss.
    """
    image, text = image_features, text_features
    _check(image, text, image_ids, text_ids, reduction, grad_reduction)
    scale = as_scalar("siglip_loss", "logit_scale", logit_scale, image)
    bias = as_scalar("siglip_loss", "logit_bias", 0.0 if logit_bias is None else logit_bias, image)
    name, size = (group_name(group), group_size(group)) if group is not None else ("", 1)
    arguments = (image, text, scale, bias, image_ids, text_ids, normalize)
    if not name and _plain_serves(image, text):
        loss, counts = siglip_loss_plain(*arguments, metrics=return_metrics)
    else:
        backends.choose("siglip_loss", _facts(image, text))
        factor = float(size) if grad_reduction == "ddp_mean" else 1.0
        loss, counts = _siglip_loss(*arguments, return_metrics, compute_dtype(image), name, factor)
    images, texts = len(image) * size, len(text) * size
    result = loss / images if reduction == "mean" else loss
    if not return_metrics:
        return result
    positive_loss, positives, right, wrong = counts.detach().to(torch.float32).unbind()
    positive_loss = positive_loss / images
    values = (
        positive_loss,
        (loss.detach() / images).to(torch.float32) - positive_loss,
        right / positives,
        1 - wrong / (images * texts - positives),
    )
    return result, dict(zip(METRICS, values, strict=True))


def cost(image_features: Tensor, text_features: Tensor, *, backward: bool = False) -> dict[str, int]:
    """FLOPs of the matrix products, and bytes through device memory that the op cannot do without."""
    unit = 2 * image_features.shape[0] * text_features.numel()  # one product of all rows by all columns
    elements = image_features.numel() + text_features.numel()
    features = elements * image_features.element_size()
    # Backward: a product for either side; writes both gradients.
    return {"flops": 2 * unit if backward else unit, "bytes": features}


def _facts(image: Tensor, text: Tensor) -> backends.Facts:
    return backends.Facts(image.device, compute_dtype(image), image.shape[1], len(image), len(text))


def _plain_serves(image: Tensor, text: Tensor) -> bool:
    """Whether the whole matrix is so small, or a transform needs, that PyTorch's own ops compute it."""
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        backends.choose("siglip_loss", _facts(image, text))  # refuses if a kernel is forced
        return True
    if len(image) * len(text) == 0:
        return True
    if backends.forced() is not None or len(image) * len(text) > SMALL:
        return False
    if backends.torch_serves(image):
        return True
    backends.choose("siglip_loss", _facts(image, text)._replace(refusal=f"{len(image)} x {len(text)} logits are few"))
    return True


class SigLipLossFunction(torch.autograd.Function):
    """Autograd of `siglip_loss`: keeps the gradients that the forward pass made."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        needs = list(ctx.needs_input_grad[:4])
        loss, counts, *gradients = _siglip_loss_forward(image, text, scale, bias, *rest[:-1], needs)
        ctx.save_for_backward(image, text, scale, bias, *rest[:2], *gradients)
        ctx.normalize, ctx.group, ctx.factor = rest[2], rest[-2], rest[-1]
        ctx.mark_non_differentiable(counts)
        ctx.set_materialize_grads(False)
        return loss, counts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        image, text, scale, bias, image_ids, text_ids, *gradients = ctx.saved_tensors
        needs, dloss = ctx.needs_input_grad[:4], grads[0]
        found: tuple[Tensor | None, ...] = (None,) * 4
        if dloss is None:
            pass
        elif torch.is_grad_enabled():  # create_graph=True: PyTorch's own ops on the whole matrix
            if ctx.group:
                raise RuntimeError("siglip_loss: the gradient over a process group cannot be differentiated again")

            def again(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
                return siglip_loss_plain(image, text, scale, bias, image_ids, text_ids, ctx.normalize)[0]

            found = differentiable_backward(again, (image, text, scale, bias), (dloss,), needs)
        else:
            found = _siglip_loss_backward(dloss, scale, *gradients, ctx.factor, image.dtype, text.dtype)
        return (*(grad if need else None for grad, need in zip(found, needs, strict=True)), *(None,) * 7)


def _autograd(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """With a gradient to come, the function that makes it at once; without, the op alone."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (image, text, scale, bias)):
        return SigLipLossFunction.apply(image, text, scale, bias, *rest)
    with torch._C._AutoDispatchBelowAutograd():
        return _siglip_loss(image, text, scale, bias, *rest)


# What the registered ops run. A gradient that is not wanted is an empty tensor: a schema's results cannot be None.


class _Call(NamedTuple):
    """Arguments of the registered ops, in their order."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor
    image_ids: Tensor | None
    text_ids: Tensor | None
    normalize: bool
    metrics: bool
    dtype: torch.dtype
    group: str

    def run(self, needs: tuple[bool, ...]) -> Result:
        """Forward, by the backend that serves."""
        facts = backends.Facts(self.image.device, self.dtype, self.image.shape[1], len(self.image), len(self.text))
        backend = backends.pick("siglip_loss", facts)
        return forward(Inputs(*self[:6]), Options(*self[6:], backend), needs)  # type: ignore[arg-type]


def _implementation(*args: Any) -> tuple[Tensor, Tensor]:
    return _Call(*args[:-1]).run((False,) * 4)[:2]


def _forward(*args: Any) -> tuple[Tensor, ...]:
    call = _Call(*args[:-1])
    loss, counts, gradients = call.run(tuple(args[-1]))
    empty = (x.new_empty(0, dtype=loss.dtype) for x in call[:4])
    return loss, counts, *(e if grad is None else grad for grad, e in zip(gradients, empty, strict=True))


def _backward(
    dloss: Tensor,
    scale: Tensor,
    dimage: Tensor,
    dtext: Tensor,
    dscale: Tensor,
    dbias: Tensor,
    factor: float,
    image_dtype: torch.dtype,
    text_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    upstream = dloss * factor
    sides = (
        torch.mul(gradient, upstream * scale, out=torch.empty_like(gradient, dtype=dtype))
        for gradient, dtype in ((dimage, image_dtype), (dtext, text_dtype))
    )
    return *sides, dscale * upstream, dbias * upstream


def _implementation_fake(*args: Any) -> tuple[Tensor, Tensor]:
    scale = args[2]
    return scale.new_empty(()), scale.new_empty(4)


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    like = args[2]
    made = (like.new_empty(x.shape if need else 0) for x, need in zip(args[:4], args[-1], strict=True))
    return like.new_empty(()), like.new_empty(4), *made


def _backward_fake(dloss: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *gradients, _, image_dtype, text_dtype = rest
    dtypes = image_dtype, text_dtype, gradients[2].dtype, gradients[3].dtype
    return tuple(torch.empty_like(grad, dtype=dtype) for grad, dtype in zip(gradients, dtypes, strict=True))


def _check(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    reduction: str,
    grad_reduction: str,
) -> None:
    op = "siglip_loss"
    check_features(op, image, text)
    check_ids(op, image, text, image_ids, text_ids)
    if image_ids is None and len(image) != len(text):
        raise ValueError(
            f"{op}: {len(image)} images and {len(text)} texts need image_ids and text_ids to tell which belong together"
        )
    for name, value, known in (
        ("reduction", reduction, REDUCTIONS),
        ("grad_reduction", grad_reduction, GRAD_REDUCTIONS),
    ):
        if value not in known:
            raise ValueError(f"{op}: {name} must be one of {', '.join(known)}, got {value!r}")


_ARGUMENTS = (
    "Tensor image, Tensor text, Tensor scale, Tensor bias, Tensor? image_ids, Tensor? text_ids, "
    "bool normalize, bool metrics, ScalarType dtype, str group"
)
_siglip_loss = register(
    f"siglip_loss({_ARGUMENTS}, float factor) -> (Tensor, Tensor)",
    _implementation,
    fake=_implementation_fake,
    autograd=_autograd,
)
_siglip_loss_forward = register(
    f"siglip_loss_forward({_ARGUMENTS}, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    fake=_forward_fake,
)
_siglip_loss_backward = register(
    "siglip_loss_backward(Tensor dloss, Tensor scale, Tensor dimage, Tensor dtext, Tensor dscale, Tensor dbias, "
    "float factor, ScalarType image_dtype, ScalarType text_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
