"""`NoiseSchedule`: how much noise a diffusion model adds at each timestep."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._betas import BETA_SCHEDULES, betas_of_alphas, betas_of_name, with_zero_snr

__all__ = ["NoiseSchedule"]

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
SPACINGS = ("leading", "trailing", "linspace")
# The constructor's arguments, in its order.
WORDS = (
    *("beta_schedule", "num_train_timesteps", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr"),
    *("prediction_type", "variance_type", "clip_sample", "clip_sample_range", "thresholding"),
    *("dynamic_thresholding_ratio", "sample_max_value", "set_alpha_to_one", "timestep_spacing", "steps_offset"),
)


class NoiseSchedule(nn.Module):
    """How much noise there is at each of T timesteps, and how to sample: diffusers' words, with its defaults.

    With betas (T,), alpha-bar at timestep t is the product of `1 - betas[:t + 1]`, and a noised sample is
    `sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise`. Timesteps count from 0; the one before the first is -1.

    Tables are computed in float64 and kept in float32 as pairs whose sum is good to 48 bits, so that `1 - alpha_bar`
    is right at every timestep. They move with `.to(device)` and are saved in the state dict; `.half()`, `.bfloat16()`
    and `.to(torch.float64)` leave their dtype alone.

    Args:
        beta_schedule: "linear", "scaled_linear" (linear in the square root; Stable Diffusion's), "squaredcos_cap_v2"
            (cosine), "sigmoid" or "laplace".
        num_train_timesteps: T, how many timesteps the model is trained with.
        beta_start: beta of the first timestep, for the linear, scaled_linear and sigmoid schedules.
        beta_end: beta of the last.
        trained_betas: (T,) betas in (0, 1], as a sequence, tensor or array, in place of all four above.
        rescale_betas_zero_snr: shift the schedule so that the last alpha-bar is 0 (arXiv:2305.08891, algorithm 1).
        prediction_type: what the model predicts: "epsilon" (the noise), "sample" (x_0) or "v_prediction".
        variance_type: of `ddpm_step`: "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned"
            or "learned_range". The first two are the same, and so are the next two.
        clip_sample: whether steps clip the predicted x_0.
        clip_sample_range: to plus and minus this.
        thresholding: whether steps use dynamic thresholding instead (arXiv:2205.11487, section 2.3).
        dynamic_thresholding_ratio: its quantile.
        sample_max_value: its largest threshold.
        set_alpha_to_one: alpha-bar before timestep 0 is 1; else that of timestep 0, as Stable Diffusion's DDIM has it.
        timestep_spacing: of `timesteps`: "leading", "trailing" or "linspace".
        steps_offset: what "leading" adds to each timestep.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or alpha-bar becomes 0 before the last timestep.

    Source: the arguments of diffusers' `DDPMScheduler` and `DDIMScheduler`.
    """

    alpha_table: (
        Tensor  # (T + 1, 2) float32: row 1 + t is alphas_cumprod[t] as high and low part; row 0 is before t = 0
    )
    _index: Tensor  # int64 (T + 1,): -1 to T - 1

    def __init__(
        self,
        beta_schedule: str = "linear",
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        *,
        trained_betas: Sequence[float] | Tensor | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        set_alpha_to_one: bool = True,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
    ) -> None:
        super().__init__()
        _check_word("beta_schedule", beta_schedule, BETA_SCHEDULES)
        _check_word("prediction_type", prediction_type, PREDICTION_TYPES)
        _check_word("variance_type", variance_type, VARIANCE_TYPES)
        _check_word("timestep_spacing", timestep_spacing, SPACINGS)
        for name, value in (
            ("rescale_betas_zero_snr", rescale_betas_zero_snr),
            ("clip_sample", clip_sample),
            ("thresholding", thresholding),
            ("set_alpha_to_one", set_alpha_to_one),
        ):
            if not isinstance(value, bool):
                raise TypeError(f"NoiseSchedule: {name} must be a bool, got {type(value).__name__}")
        _check_int("num_train_timesteps", num_train_timesteps, 1)
        _check_int("steps_offset", steps_offset, 0)
        _check_number("beta_start", beta_start, 1.0)
        _check_number("beta_end", beta_end, 1.0)
        _check_number("clip_sample_range", clip_sample_range)
        _check_number("dynamic_thresholding_ratio", dynamic_thresholding_ratio, 1.0)
        _check_number("sample_max_value", sample_max_value)
        self.trained_betas = None if trained_betas is None else _listed(trained_betas)
        self.beta_schedule = beta_schedule
        self.num_train_timesteps = num_train_timesteps if self.trained_betas is None else len(self.trained_betas)
        self.beta_start = beta_start
        self.beta_end = beta_end
        self.rescale_betas_zero_snr = rescale_betas_zero_snr
        self.prediction_type = prediction_type
        self.variance_type = variance_type
        self.clip_sample = clip_sample
        self.clip_sample_range = clip_sample_range
        self.thresholding = thresholding
        self.dynamic_thresholding_ratio = dynamic_thresholding_ratio
        self.sample_max_value = sample_max_value
        self.set_alpha_to_one = set_alpha_to_one
        self.timestep_spacing = timestep_spacing
        self.steps_offset = steps_offset
        rows = self._rows()
        self.register_buffer("alpha_table", torch.tensor(rows, dtype=torch.float32))
        self.register_buffer("_index", torch.arange(-1, self.num_train_timesteps), persistent=False)
        self.zero_terminal_snr = rows[-1][0] == 0.0
        """Whether the last alpha-bar is 0: nothing of x_0 is left there, and epsilon does not tell it."""

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> NoiseSchedule:
        """The schedule of a diffusers scheduler, or of its config: any that has betas.

        Words that say nothing about the noise or the two samplers are ignored. A scheduler whose `alphas_cumprod` no
        longer is what its config says, such as one rescaled by hand, gives the schedule that it has.

        Args:
            scheduler: a scheduler of diffusers or of mmfast, or a mapping such as `scheduler.config`.

        Raises:
            TypeError: it is neither.
            ValueError: it has no betas (flow matching, for one), or a value that mmfast does not know.
        """
        config = getattr(scheduler, "config", scheduler)
        if not isinstance(config, Mapping):
            kind = type(scheduler).__name__
            raise TypeError(f"NoiseSchedule.from_diffusers: expected a scheduler or its config, got {kind}")
        name = str(config.get("_class_name", "") if config is scheduler else type(scheduler).__name__)
        if name and config.get("beta_schedule") is None and config.get("trained_betas") is None:
            raise ValueError(f"NoiseSchedule.from_diffusers: {name} has no beta_schedule and no trained_betas")
        if config is scheduler and config.get("snr_shift_scale", 1.0) != 1.0:
            raise ValueError(
                "NoiseSchedule.from_diffusers: snr_shift_scale must be 1 in a config, got "
                f"{config['snr_shift_scale']}: pass the scheduler itself"
            )
        words = {word: config[word] for word in WORDS if config.get(word) is not None}
        if "_use_default_values" in config or (name and not name.startswith(("DDPM", "DDIM"))):
            words.setdefault("clip_sample", False)  # a scheduler without the word does not clip
        schedule = cls(**words)
        actual = None if config is scheduler else getattr(scheduler, "alphas_cumprod", None)
        if isinstance(actual, Tensor) and not actual.is_meta:
            exact = actual.detach().to("cpu", torch.float64)
            # diffusers computes in float32, which is off by less than this.
            if (
                exact.shape != (schedule.num_train_timesteps,)
                or (exact - schedule._host_double()[1:]).abs().max() > 1e-4
            ):
                words |= {"trained_betas": betas_of_alphas(exact.tolist()), "rescale_betas_zero_snr": False}
                schedule = cls(**words)
        return schedule

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments: `NoiseSchedule(**schedule.config)` is the same schedule on the CPU."""
        return {word: getattr(self, word) for word in WORDS}

    @property
    def alphas_cumprod_double(self) -> Tensor:
        """float64 (T + 1,): alpha-bar before timestep 0, then of each timestep."""
        return self.alpha_table[:, 0].double() + self.alpha_table[:, 1].double()

    @property
    def alphas_cumprod(self) -> Tensor:
        """float32 (T,): alpha-bar of each timestep."""
        return self.alpha_table[1:, 0]

    @property
    def alphas(self) -> Tensor:
        """float32 (T,): 1 - beta of each timestep."""
        return (1.0 - self._betas_double()).float()

    @property
    def betas(self) -> Tensor:
        """float32 (T,): the variance that each timestep adds."""
        return self._betas_double().float()

    def snr(self, t: Tensor | int | None = None) -> Tensor:
        """Signal-to-noise ratio `alpha_bar / (1 - alpha_bar)` in float32: of all timesteps (T,), or of `t`.

        Args:
            t: an int or an integer tensor of any shape, on the schedule's device or the CPU.

        Raises:
            TypeError: t is of another type.
            ValueError: a t on the CPU is not from 0 to T - 1. On a GPU the ratio there is NaN.
        """
        last = self.num_train_timesteps - 1
        alphas_cumprod = self.alphas_cumprod_double[1:]
        ratios = (alphas_cumprod / (1.0 - alphas_cumprod)).float()
        if t is None:
            return ratios
        if isinstance(t, int) and not isinstance(t, bool):
            if not 0 <= t <= last:
                raise ValueError(f"NoiseSchedule.snr: t must be from 0 to {last}, got {t}")
            return ratios[t]
        if not isinstance(t, Tensor) or t.dtype.is_floating_point or t.dtype == torch.bool:
            kind = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"NoiseSchedule.snr: t must be an int or an integer tensor, got {kind}")
        inside = (t >= 0) & (t <= last)
        if t.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(inside.all()):
            raise ValueError(f"NoiseSchedule.snr: t must be from 0 to {last}, got {t.tolist()}")
        t, inside = t.to(ratios.device).long(), inside.to(ratios.device)
        return torch.where(inside, ratios.take(t.clamp(0, last)), float("nan"))  # a () index would be read on the host

    def timesteps(self, num_inference_steps: int, spacing: str | None = None) -> Tensor:
        """The timesteps that sampling visits, as diffusers' `set_timesteps` chooses them.

        Args:
            num_inference_steps: how many, from 1 to T.
            spacing: "leading", "trailing" or "linspace"; None: the schedule's.

        Returns:
            int64 (num_inference_steps,) on the CPU, descending.

        Raises:
            TypeError: num_inference_steps is no int.
            ValueError: an argument is out of range, or steps_offset takes a timestep beyond T - 1.
        """
        _check_int("num_inference_steps", num_inference_steps, 1, op="NoiseSchedule.timesteps")
        total, steps = self.num_train_timesteps, num_inference_steps
        spacing = self.timestep_spacing if spacing is None else spacing
        _check_word("spacing", spacing, SPACINGS, op="NoiseSchedule.timesteps")
        if steps > total:
            raise ValueError(
                f"NoiseSchedule.timesteps: num_inference_steps must be at most num_train_timesteps={total}, got {steps}"
            )
        if spacing == "linspace":
            gap = (total - 1) / max(steps - 1, 1)
            found = [round(i * gap) for i in reversed(range(steps))]
        elif spacing == "leading":
            found = [i * (total // steps) + self.steps_offset for i in reversed(range(steps))]
        else:
            gap = (total - total / steps) - total  # rounded as numpy.arange rounds it
            found = [round(total + i * gap) - 1 for i in range(steps)]
        if found[0] >= total:
            raise ValueError(
                f"NoiseSchedule.timesteps: steps_offset={self.steps_offset} takes the first of {steps} timesteps to "
                f"{found[0]}, beyond {total - 1}"
            )
        return torch.tensor(found, dtype=torch.int64, device="cpu")

    def extra_repr(self) -> str:
        """The schedule in words; settings only where they are not the default."""
        if self.trained_betas is None:
            shown = [f"{self.beta_schedule}, num_train_timesteps={self.num_train_timesteps}"]
            if self.beta_schedule not in ("squaredcos_cap_v2", "laplace"):
                shown.append(f"beta_start={self.beta_start}, beta_end={self.beta_end}")
        else:
            shown = [f"trained_betas=({self.num_train_timesteps},)"]
        defaults = NoiseSchedule.__init__.__kwdefaults__ or {}
        for word, default in defaults.items():
            value = getattr(self, word)
            if word != "trained_betas" and (value != default or word == "prediction_type"):
                shown.append(f"{word}={value}")
        return ", ".join(shown)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoiseSchedule:
        """Move the tables as `fn` does, but never cast them; what `fn` cannot move, from meta, is made anew."""
        table, index = self.alpha_table, self._index
        moved = fn(table)
        if moved.dtype != table.dtype:
            moved = table.to(moved.device)
        if table.is_meta and not moved.is_meta:
            moved = torch.tensor(self._rows(), dtype=torch.float32, device=moved.device)
        self.alpha_table = moved
        moved = fn(index)
        if moved is not index:  # `to_empty` leaves it unset, and a state dict does not hold it
            moved = torch.arange(-1, self.num_train_timesteps, device=moved.device)
        self._index = moved
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Load the table; betas other than the schedule's own become its `trained_betas`."""
        key = prefix + "alpha_table"
        loaded, own = state_dict.get(key), torch.tensor(self._rows(), dtype=torch.float32, device="cpu")
        if not isinstance(loaded, Tensor) or loaded.is_meta or loaded.shape != own.shape:
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        table = loaded.detach().to("cpu")
        if table.dtype.itemsize < 4:  # a checkpoint that was cast: no table can be read off it
            if not torch.equal(table, own.to(table.dtype)):
                args[-1].append(
                    f"{key} was saved in {table.dtype}, which does not tell it: leave it out of the checkpoint"
                )
                return
            loaded = table = own
        super()._load_from_state_dict({**state_dict, key: loaded.float()}, prefix, *args)
        if not torch.equal(table.float(), own):
            rows = table.double().sum(1).tolist()
            self.trained_betas, self.rescale_betas_zero_snr = betas_of_alphas(rows[1:]), False
            self.set_alpha_to_one = rows[0] == 1.0
        self.zero_terminal_snr = bool(table[-1, 0] == 0)

    def _signal_and_sigma(self) -> Tensor:
        """float32 (T, 2): sqrt(alpha_bar) and sqrt(1 - alpha_bar)."""
        return self._kept("signal and sigma", lambda now, before: (now, 1.0 - now))

    def _step_signal_and_sigma(self) -> Tensor:
        """float32 (T, 2): sqrt(1 - beta) and sqrt(beta)."""
        return self._kept("of a step", lambda now, before: (now / before, (before - now) / before))

    def _kept(self, name: str, squares: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        """Roots (T, 2) of two functions of alpha-bar and the one before, kept until the table is another or changed."""
        table = self.alpha_table
        kept = None if table.is_inference() else self.__dict__.get("_roots", {}).get(name)
        if kept is None or kept[0] is not table or kept[1] != table._version:
            with torch.inference_mode(False), torch.no_grad():
                now = table[1:].double().sum(1)
                before = torch.cat((torch.ones_like(now[:1]), now[:-1]))
                roots = torch.stack(squares(now, before), 1).clamp(0).sqrt().float()
            if table.is_inference():  # has no version
                return roots
            kept = self.__dict__.setdefault("_roots", {})[name] = (table, table._version, roots)
        found: Tensor = kept[2]
        return found

    def _rows(self) -> list[tuple[float, float]]:
        """Alpha-bar before timestep 0 and of each, as a float32 and what it leaves."""
        if self.trained_betas is None:
            betas = betas_of_name(self.beta_schedule, self.num_train_timesteps, self.beta_start, self.beta_end)
        else:
            betas = self.trained_betas
        exact, product = [], 1.0
        for beta in betas:
            product *= 1.0 - beta
            exact.append(product)
        if self.rescale_betas_zero_snr:
            exact = with_zero_snr(exact)
        high = array("f", exact)
        if 0.0 in high[:-1]:
            raise ValueError(
                f"NoiseSchedule: alphas_cumprod must not be 0 before the last timestep, {len(exact) - 1}, got 0 at "
                f"timestep {high.index(0.0)}: betas must be smaller"
            )
        exact.insert(0, 1.0 if self.set_alpha_to_one else exact[0])
        return [(head, whole - head) for whole, head in zip(exact, array("f", exact), strict=True)]

    def _host_double(self) -> Tensor:
        return torch.tensor([high + low for high, low in self._rows()], dtype=torch.float64, device="cpu")

    def _betas_double(self) -> Tensor:
        alphas_cumprod = self.alphas_cumprod_double[1:]
        before = torch.cat((torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]))
        return (before - alphas_cumprod) / before


def _listed(betas: Any) -> list[float]:
    """`trained_betas` as a list of floats, checked."""
    try:
        values = torch.as_tensor(betas, dtype=torch.float64, device=None if isinstance(betas, Tensor) else "cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(betas).__name__
        raise TypeError(f"NoiseSchedule: trained_betas must be a sequence of numbers, got {kind}") from error
    if values.dim() != 1 or not len(values):
        raise ValueError(f"NoiseSchedule: trained_betas must have shape (T,), got {tuple(values.shape)}")
    listed: list[float] = values.tolist()
    for t, beta in enumerate(listed):
        if not 0.0 < beta <= 1.0:
            raise ValueError(f"NoiseSchedule: trained_betas must be in (0, 1], got {beta} at timestep {t}")
    return listed


def _check_word(name: str, value: object, known: tuple[str, ...], op: str = "NoiseSchedule") -> None:
    if value not in known:
        raise ValueError(f"{op}: {name} must be one of {', '.join(known)}, got {value!r}")


def _check_int(name: str, value: object, lowest: int, op: str = "NoiseSchedule") -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < lowest:
        raise ValueError(f"{op}: {name} must be at least {lowest}, got {value}")


def _check_number(name: str, value: object, highest: float = math.inf) -> None:
    if not isinstance(value, (float, int)) or isinstance(value, bool):
        raise TypeError(f"NoiseSchedule: {name} must be a number, got {type(value).__name__}")
    if not 0.0 < value <= highest or value == math.inf:
        within = "positive and finite" if highest == math.inf else f"in (0, {highest:g}]"
        raise ValueError(f"NoiseSchedule: {name} must be {within}, got {value}")
