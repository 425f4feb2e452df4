"""`SigLipLoss`: open_clip's, on `mmfast.ops.siglip_loss`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops import siglip_loss
from .clip_loss import ContrastiveLoss

DIST_IMPLS = ("bidir", "shift", "reduce", "gather")


class SigLipLoss(ContrastiveLoss):
    """Drop-in for open_clip's `SigLipLoss`: same constructor, call and parameter gradients, without matrices of logits.

    With `world_size` above 1 features are exchanged over the default process group (or over `group`). What forward
    returns is the loss of the whole batch, on every rank, of which open_clip's are the parts: it is their mean.
    Gradients are such that DistributedDataParallel's mean of them is the whole batch's, as open_clip's are. What
    `ClipLoss` says of ranks that disagree holds here.

    Args:
        cache_labels: accepted; there are no labels to cache.
        rank: of this process in the group.
        world_size: size of the default process group; 1: this process alone, or `group`.
        dist_impl: how open_clip moves features, "bidir", "shift", "reduce" or "gather"; accepted. Here they are
            gathered, or go round the ranks where they would take too much memory.
        normalize: divide features by their lengths (open_clip's models have done so).
        group: a torch.distributed process group in place of the default one.
        grad_reduction: "ddp_mean", for parameters whose gradients are averaged over the ranks, or "sum", for those
            whose gradients are added up.

    Raises:
        ValueError: rank, world_size or the group do not fit; an unknown dist_impl.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        normalize: bool = False,
        group: Any = None,
        grad_reduction: str = "ddp_mean",
    ) -> None:
        super().__init__(rank, world_size, group, grad_reduction)
        if dist_impl is not None and dist_impl not in DIST_IMPLS:
            raise ValueError(f"SigLipLoss: dist_impl must be one of {', '.join(DIST_IMPLS)}, got {dist_impl!r}")
        self.cache_labels = cache_labels
        self.dist_impl = dist_impl or "bidir"
        self.normalize = normalize

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
        *,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
        return_metrics: bool = False,
    ) -> Any:
        """Return the loss, or {"contrastive_loss": loss} if `output_dict`; with `return_metrics` that and a dict.

        Args:
            image_features: (M, D), this rank's.
            text_features: (N, D).
            logit_scale: the multiplier, as open_clip's models return it.
            logit_bias: added to every logit; None is 0.
            output_dict: return a dict, whose values open_clip's training loop adds up.
            image_ids: (M,) integers that tell positives, with `text_ids` (N,), see `mmfast.ops.siglip_loss`.
            text_ids: see image_ids.
            return_metrics: also return losses and accuracies of positives and negatives, see `mmfast.ops.siglip_loss`.
        """
        result = siglip_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            normalize=self.normalize,
            image_ids=image_ids,
            text_ids=text_ids,
            group=self.group_name() or None,
            grad_reduction=self.grad_reduction,
            return_metrics=return_metrics,
        )
        loss, metrics = result if return_metrics else (result, None)
        shown = {"contrastive_loss": loss} if output_dict else loss
        return (shown, metrics) if return_metrics else shown

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return ", ".join(filter(None, (super().extra_repr(), "normalize=True" if self.normalize else "")))
