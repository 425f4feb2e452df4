"""`CLIP`: an image tower and a text tower into one space, with open_clip's parameter names, on mmfast's ops."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _clip_load as load
from ._clip_config import (
    CLIP_MEAN,
    CLIP_STD,
    SIGLIP_MEAN,
    SIGLIP_STD,
    TextConfig,
    VisionConfig,
    text_config,
    vision_config,
)
from ._clip_features import CLIPFeatures
from ._clip_resnet import ModifiedResNet
from ._clip_text import TextTransformer, lock_text, text_features, text_tokens, trim_text
from ._clip_vision import TrunkTower, VisionTransformer

INIT_LOGIT_SCALE = math.log(1 / 0.07)
Config = str | Mapping[str, Any]


class CLIP(CLIPFeatures):
    """Contrastive image and text towers: CLIP, with a ViT or a ModifiedResNet, and SigLIP.

    Configurations, parameter names, initialisation, methods and outputs are open_clip's: of its `CLIP`, or of its
    `CustomTextCLIP` with `custom_text=True`, whose text tower is named `text.`. OpenAI's checkpoints have the names of
    the former. What a feature does not depend on is not computed: of the last block only the token that is pooled, of
    the ResNet's attention pool one query, and on a CPU nothing behind the end of the longest text.

        model = CLIP.from_config("ViT-B-32")
        model = CLIP.from_pretrained("ViT-B-32.pt")       # OpenAI's file, or a checkpoint of open_clip
        image_features, text_features, logit_scale = model(images, tokens)

    Args:
        embed_dim: width of the features of both towers.
        vision_cfg: the image tower, by open_clip's fields (`layers`, `width`, `patch_size`, `image_size`, ...): four
            `layers` make a ModifiedResNet, a `timm_model_name` SigLIP's ViT. `pool_type` is "tok", the class token,
            or "avg", the mean of the patches.
        text_cfg: the text tower, likewise. `pool_type` is "argmax" (the first of the largest ids, CLIP's end of text),
            "eos" (the first `eos_id`), "first", "last", or mmfast's own "avg", the mean of the tokens without padding.
        quick_gelu: `x * sigmoid(1.702 x)` instead of GELU, as OpenAI's weights need.
        init_logit_scale: logarithm of the first scale.
        init_logit_bias: first bias of the logits; None for none.
        nonscalar_logit_scale: scale and bias have the shape (1,) instead of ().
        output_dict: `forward` returns a dictionary.
        custom_text: name the text tower's parameters `text.*`.
        mean: of the channels; with std, uint8 images are accepted and become `(images / 255 - mean) / std`. Floating
            images are taken as they are.
        std: likewise.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: a configuration is not a mapping; in forward, images or text have another dtype.
        ValueError: a field is unknown, out of its range, or asks for a part that is not served; in forward, a shape
            does not fit.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv:2103.00020;
    Zhai et al., "Sigmoid Loss for Language Image Pre-Training", arXiv:2303.15343; open_clip 3.3.
    """

    text_projection: Any

    def __init__(
        self,
        embed_dim: int,
        vision_cfg: Mapping[str, Any] | VisionConfig,
        text_cfg: Mapping[str, Any] | TextConfig,
        quick_gelu: bool = False,
        init_logit_scale: float = INIT_LOGIT_SCALE,
        init_logit_bias: float | None = None,
        nonscalar_logit_scale: bool = False,
        output_dict: bool = False,
        *,
        custom_text: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.vision_cfg, self.text_cfg = vision_config(vision_cfg), text_config(text_cfg)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed_dim = embed_dim
        self.quick_gelu = quick_gelu
        self.output_dict = output_dict
        self.custom_text = custom_text
        self.context_length = self.text_cfg.context_length
        self.vocab_size = self.text_cfg.vocab_size
        self.visual: Any
        if self.vision_cfg.timm_model_name is not None or self.vision_cfg.trunk is not None:
            self.visual = TrunkTower(self.vision_cfg, embed_dim, mean, std, factory)
        elif isinstance(self.vision_cfg.layers, int):
            self.visual = VisionTransformer(self.vision_cfg, embed_dim, quick_gelu, mean, std, factory)
        else:
            self.visual = ModifiedResNet(self.vision_cfg, embed_dim, mean, std, factory)
        text = TextTransformer(self.text_cfg, embed_dim, quick_gelu, factory)
        if custom_text:
            self.text = text
        else:  # in open_clip's order, which an optimizer's state goes by
            self.transformer = text.transformer
            self.token_embedding = text.token_embedding
            self.positional_embedding = text.positional_embedding
            self.ln_final = text.ln_final
            self.text_projection = text.text_projection
        shape = (1,) if nonscalar_logit_scale else ()
        self.logit_scale = nn.Parameter(torch.full(shape, float(init_logit_scale), **factory))
        self.preprocess: dict[str, Any] = {}
        self.logit_bias: nn.Parameter | None = None
        if init_logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.full(shape, float(init_logit_bias), **factory))

    @classmethod
    def from_config(
        cls,
        config: Config,
        *,
        image_size: int | tuple[int, int] | None = None,
        context_length: int | None = None,
        uint8: bool = False,
        **overrides: Any,
    ) -> CLIP:
        """Build a model by open_clip's name of its architecture, or from a configuration, with random weights.

        Args:
            config: a name such as "RN50", "ViT-B-32", "ViT-L-14-336-quickgelu" or "ViT-B-16-SigLIP"
                (`mmfast.models.clip_names()` lists them), or a dictionary as in open_clip's files.
            image_size: instead of the configuration's.
            context_length: likewise.
            uint8: accept uint8 images, normalised as CLIP's or SigLIP's training images were.
            **overrides: arguments of `CLIP`.

        Raises:
            ValueError: the name is unknown; and as `CLIP`.
        """
        arguments = load.full_config(config, image_size, context_length)
        if uint8:
            arguments.update(_normalisation(arguments))
        model = cls(**{**arguments, **overrides})
        if image_size is not None and isinstance(model.visual, TrunkTower):
            model.visual.set_input_size(image_size)
        return model

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Any],
        config: Config | None = None,
        *,
        tag: str | None = None,
        quick_gelu: bool | None = None,
        image_size: int | tuple[int, int] | None = None,
        context_length: int | None = None,
        strict: bool = True,
        uint8: bool = False,
        **overrides: Any,
    ) -> CLIP:
        """Build a model from a checkpoint's tensors, in evaluation mode, and load them.

        Positions are resampled where the model has another image size (bicubic with antialiasing, the class token
        apart) or context length (linear). The parameters are float32, also of a float16 checkpoint, unless `dtype`
        says otherwise.

        Args:
            state_dict: with the names of open_clip's `CLIP` or `CustomTextCLIP`, of OpenAI's, or of transformers'
                `CLIPModel` or `SiglipModel`. OpenAI's `input_resolution`, `context_length` and `vocab_size` are
                dropped. Not changed.
            config: the architecture, as in `from_config`; by default the one whose shapes these are. Shapes do not
                tell the width of heads, the pooling or the activation: a checkpoint that no known architecture fits is
                taken for one of heads of 64 with CLIP's pooling.
            tag: open_clip's name of the weights ("openai", "laion2b_s34b_b79k"): says whether they need QuickGELU.
            quick_gelu: whether the weights need QuickGELU; by default what the configuration, the tag, or the layout
                of OpenAI's files says, and GELU for open_clip's. transformers' names alone do not say it.
            image_size: of the model, instead of the checkpoint's.
            context_length: likewise.
            strict: every name must be in both.
            uint8: as in `from_config`.
            **overrides: arguments of `CLIP`.

        Raises:
            ValueError: the layout is unknown, or the architecture cannot be told from the shapes.
            RuntimeError: a name or a shape does not fit.

        Warns:
            UserWarning: the model computes another GELU than the checkpoint was trained with.
        """
        state, layout = load.clean(state_dict)
        known = load.known_quick_gelu(config, tag, layout)
        if config is None and quick_gelu is None:
            quick_gelu = load.told_quick_gelu(known, layout, state)
        arguments = load.config_of(state) if config is None else load.full_config(config)
        if quick_gelu is not None:
            arguments["quick_gelu"] = quick_gelu
        load.warn_of_gelu(known, bool({**arguments, **overrides}.get("quick_gelu", False)), tag)
        device = overrides.pop("device", None)
        # Every tensor is loaded, so none is drawn before: that takes longer than loading. Unless some may be missing.
        model = cls.from_config(
            arguments,
            image_size=image_size,
            context_length=context_length,
            uint8=uint8,
            device="meta" if strict else device,
            **overrides,
        )
        if strict:
            model.to_empty(device=torch.get_default_device() if device is None else device)
        model.load_state_dict(load.fitted(state, model), strict=strict)
        return model.eval()

    @classmethod
    def from_pretrained(
        cls, source: str | Path | Mapping[str, Any], config: Config | None = None, **options: Any
    ) -> CLIP:
        """Load a checkpoint: a file, a folder of open_clip's, or its tensors.

        Args:
            source: a file of torch (a state dict, or a training checkpoint with one), of safetensors, or OpenAI's
                TorchScript archive; a folder with `open_clip_config.json` and such a file; or a state dict. Nothing
                is downloaded.
            config: as in `from_state_dict`; by default the folder's, or told from the shapes.
            **options: as in `from_state_dict`.

        Raises:
            FileNotFoundError: the file, or a file in the folder, is missing.
            ImportError: a safetensors file without the package.
            ValueError: as `from_state_dict`.

        Warns:
            UserWarning: as `from_state_dict`.
        """
        if isinstance(source, Mapping):
            return cls.from_state_dict(source, config, **options)
        path, found = load.locate(Path(source))
        model = cls.from_state_dict(load.read(path), found if config is None else config, **options)
        given = (found or {}).get("preprocess_cfg", {})
        model.preprocess = {name: value for name, value in given.items() if name != "size"}
        return model

    @property
    def preprocess_cfg(self) -> dict[str, Any]:
        """How images are made for the model, by the fields of open_clip's `PreprocessCfg`.

        `open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**model.preprocess_cfg), False)` is
        the transform. Mean, std and interpolation are those of OpenAI's CLIP, or of SigLIP, unless the checkpoint's
        folder says otherwise (`preprocess` holds what it says).
        """
        siglip = isinstance(self.visual, TrunkTower)
        return {
            "size": self.visual.image_size,
            "mode": "RGB",
            "mean": SIGLIP_MEAN if siglip else CLIP_MEAN,
            "std": SIGLIP_STD if siglip else CLIP_STD,
            "interpolation": "bicubic",
            "resize_mode": "squash" if siglip else "shortest",
            "fill_color": 0,
            **self.preprocess,
        }

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Map images (B, 3, H, W) to features (B, embed_dim), of length 1 with `normalize`."""
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Map token ids (B, L), L <= context_length, to features (B, embed_dim), of length 1 with `normalize`."""
        features = self.text(text) if self.custom_text else text_features(self, self.text_cfg, text)
        return F.normalize(features, dim=-1) if normalize else features

    def image_tokens(self, image: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to the tower's normalised tokens: (B, N, width), the class token first if any.

        A ResNet has a feature map instead, (B, channels, H / 32, W / 32).
        """
        return self.visual.forward_features(image)

    def text_tokens(self, text: Tensor) -> Tensor:
        """Map token ids (B, L) to the tower's normalised tokens (B, L, width)."""
        return self.text.forward_features(text) if self.custom_text else text_tokens(self, self.text_cfg, text)

    def trim_text(self, text: Tensor, multiple: int = 8) -> Tensor:
        """Cut token ids (B, L) after the end of the longest text, to a multiple of `multiple`; features stay the same.

        Ids come padded to the context length, and most captions are short. Call it on ids in host memory, before they
        go to a GPU. Texts of a tower without causal mask, or that pools all tokens, come back as they are.
        """
        return trim_text(text, self.text_cfg, multiple)

    def get_logits(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of images (B, 3, H, W) against texts (M, L), (B, M), and their transpose."""
        image_features = self.encode_image(image, normalize=True)
        text_features = self.encode_text(text, normalize=True)
        logits = self.logit_scale.exp() * image_features @ text_features.T
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        return logits, logits.T

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> Any:
        """Encode images (B, 3, H, W) and token ids (B, L); either may be None, and so are its features then.

        Returns:
            (image_features, text_features, logit_scale), and logit_bias where the model has one; the features are of
            length 1, and the scale is the multiplier, not its logarithm. With `output_dict` a dictionary of these.
        """
        image_features = None if image is None else self.encode_image(image, normalize=True)
        text_features = None if text is None else self.encode_text(text, normalize=True)
        scale = self.logit_scale.exp()
        if self.output_dict:
            found = {"image_features": image_features, "text_features": text_features, "logit_scale": scale}
            return found if self.logit_bias is None else {**found, "logit_bias": self.logit_bias}
        if self.logit_bias is None:
            return image_features, text_features, scale
        return image_features, text_features, scale, self.logit_bias

    def lock_image_tower(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the image tower (locked-image tuning, arXiv:2111.07991).

        Args:
            unlocked_groups: how many of the last groups stay trainable: the projection, the last block with its norm,
                each block before it, the stem. 0 for a ResNet.
            freeze_bn_stats: also freeze the statistics of a ResNet's BatchNorms.

        Raises:
            ValueError: unlocked_groups is negative, or not 0 for a ResNet.
        """
        self.visual.lock(unlocked_groups=unlocked_groups, freeze_bn_stats=freeze_bn_stats)

    def lock_text_tower(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freeze the text tower.

        Args:
            unlocked_layers: how many of the last groups stay trainable: the projection, the last block with the final
                norm, each block before it, the embeddings.
            freeze_layer_norm: must be True: norms are frozen with their blocks.

        Raises:
            ValueError: unlocked_layers is negative, or freeze_layer_norm is False.
        """
        if not freeze_layer_norm:
            raise ValueError("CLIP: lock_text_tower freezes norms with their blocks, got freeze_layer_norm=False")
        lock_text(self.text if self.custom_text else self, unlocked_layers)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block of both towers in the backward pass instead of keeping its activations."""
        self.visual.set_grad_checkpointing(enable)
        (self.text.transformer if self.custom_text else self.transformer).grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone, beside vectors."""
        text = "text.positional_embedding" if self.custom_text else "positional_embedding"
        return {text, *(f"visual.{name}" for name in self.visual.no_weight_decay())}


def _normalisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and std of the images that a family of models is trained on."""
    vision = config["vision_cfg"]
    siglip = vision.get("timm_model_name") is not None or vision.get("trunk") is not None
    return {"mean": SIGLIP_MEAN, "std": SIGLIP_STD} if siglip else {"mean": CLIP_MEAN, "std": CLIP_STD}
