"""The config of a scheduler as diffusers keeps it: recorded from the constructor, saved to and loaded from JSON."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

S = TypeVar("S", bound="ConfigObject")

_HUB_WORDS = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision", "local_dir")


class Config(dict[str, Any]):
    """A dict that cannot be changed, whose items are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the config has no {name!r}") from None

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a scheduler's config cannot be changed in place: use register_to_config or from_config")

    __setattr__ = __setitem__ = __delitem__ = __delattr__ = __ior__ = _refuse
    update = setdefault = pop = popitem = clear = _refuse

    def __reduce__(self) -> tuple[type[Config], tuple[dict[str, Any]]]:
        return Config, (dict(self),)


def registers_config(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap a constructor so that its arguments become the object's config before it runs.

    Like diffusers', it takes and records arguments that begin with an underscore, and notes which ones were left at
    their defaults, so that a scheduler of another class takes its own.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: ConfigObject, *args: Any, **kwargs: Any) -> None:
        private = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("_")}
        bound = signature.bind(self, *args, **kwargs)
        given = set(bound.arguments)
        bound.apply_defaults()
        words = {name: value for name, value in bound.arguments.items() if name != "self"}
        private["_use_default_values"] = [name for name in words if name not in given]
        self._config = Config({**private, **words})
        _join_diffusers()
        init(*bound.args, **bound.kwargs)

    return wrapper


class _Root:
    """Python can add a base to a class only beside one that is not `object`."""


class ConfigObject(_Root):
    """What a scheduler has of diffusers' `ConfigMixin` and `SchedulerMixin`.

    Once diffusers is imported, schedulers are made as instances of its mixins too: pipelines look for these when they
    load and save their parts.
    """

    config_name = "scheduler_config.json"
    _config: Config

    def __init__(self) -> None:
        if type(self).__module__.startswith("mmfast."):
            # A pipeline writes this and the class's name when it is saved: what it saves loads with diffusers alone.
            self.__module__ = "diffusers"

    @property
    def config(self) -> Config:
        """The constructor's arguments, and what else a config held that this was made from."""
        return self._config

    @property
    def _internal_dict(self) -> Config:
        return self._config

    @_internal_dict.setter
    def _internal_dict(self, config: Mapping[str, Any]) -> None:
        # Pipelines of diffusers assign this to correct settings of old checkpoints.
        self._config = Config(config)
        self._settings_changed()

    def _settings_changed(self) -> None:
        """Called when the config was replaced."""

    def register_to_config(self, **words: Any) -> None:
        """Set words of the config; settings of sampling take effect, tables do not change."""
        self._internal_dict = Config({**self._config, **words})

    @classmethod
    def from_config(
        cls: type[S], config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> S | tuple[S, dict[str, Any]]:
        """Make a scheduler from the config of another, of mmfast or diffusers and of any class.

        Args:
            config: a mapping, such as `pipeline.scheduler.config`, or a scheduler. Words that this class does not
                have are kept in the new config; words that were left at the default are this class's default.
            return_unused_kwargs: return (scheduler, words that were not used).
            **kwargs: words that take the place of the config's.

        Raises:
            TypeError: config is no mapping.
        """
        config = getattr(config, "config", config)
        if not isinstance(config, Mapping):
            kind = type(config).__name__
            raise TypeError(f"{cls.__name__}.from_config: config must be a mapping or a scheduler, got {kind}")
        skipped = {"_use_default_values", *config.get("_use_default_values", ())}
        words = {name: value for name, value in config.items() if name not in skipped}
        known = inspect.signature(cls.__init__).parameters
        mine = {name: value for name, value in {**words, **kwargs}.items() if name in known and name != "self"}
        scheduler = cls(**mine)
        hidden = {name: value for name, value in words.items() if name not in mine}
        if "_class_name" in hidden:
            hidden["_class_name"] = cls.__name__
        scheduler.register_to_config(**hidden)
        if not return_unused_kwargs:
            return scheduler
        return scheduler, {**hidden, **{name: value for name, value in kwargs.items() if name not in mine}}

    @classmethod
    def from_pretrained(
        cls: type[S],
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> S | tuple[S, dict[str, Any]]:
        """Make a scheduler from a saved `scheduler_config.json`.

        Args:
            pretrained_model_name_or_path: the file, its folder, or a model's name on the Hugging Face hub, which needs
                huggingface_hub.
            subfolder: where in the folder or model it lies, such as "scheduler".
            return_unused_kwargs: as in `from_config`.
            **kwargs: `huggingface_hub.hf_hub_download`'s arguments, and words that take the place of the config's.

        Raises:
            OSError: there is no such file, or it is no config.
        """
        config, words = cls.load_config(pretrained_model_name_or_path, True, subfolder=subfolder, **kwargs)
        return cls.from_config(config, return_unused_kwargs, **words)

    @classmethod
    def load_config(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        return_unused_kwargs: bool = False,
        *,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Read a saved config; arguments as in `from_pretrained`.

        Returns:
            A dict, or (dict, arguments that are not the hub's).

        Raises:
            OSError: there is no such file, or it is no config.
        """
        hub = {name: kwargs.pop(name) for name in _HUB_WORDS if name in kwargs}
        file = _config_file(Path(pretrained_model_name_or_path), subfolder, cls.config_name, hub)
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OSError(f"{cls.__name__}.load_config: {file} is not JSON: {error}") from error
        return (config, kwargs) if return_unused_kwargs else config

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `scheduler_config.json` into a folder, for diffusers' class of the same name as well as this.

        Args:
            save_directory: made if it does not exist.
            push_to_hub: also upload it; needs diffusers to be imported.
            **kwargs: for diffusers' `push_to_hub`.

        Raises:
            OSError: the folder cannot be made.
            RuntimeError: push_to_hub without diffusers.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.config_name).write_text(self.to_json_string(), encoding="utf-8")
        if push_to_hub:
            upload = getattr(super(), "push_to_hub", None)
            if upload is None:
                raise RuntimeError(f"{type(self).__name__}.save_pretrained: push_to_hub needs diffusers to be imported")
            upload(kwargs.pop("repo_id", folder.name), **kwargs)

    save_config = save_pretrained

    def to_json_string(self) -> str:
        """The config as `scheduler_config.json` holds it."""
        words = {**self._config, "_class_name": type(self).__name__}
        words.pop("_use_default_values", None)
        return json.dumps(words, indent=2, sort_keys=True, default=_plain) + "\n"

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        """What the `compatibles` of diffusers' mixin lists: the same as for its class of the same name."""
        diffusers = sys.modules["diffusers"]
        names = (base.__name__ for base in cls.__mro__)
        return next(getattr(diffusers, name) for name in names if hasattr(diffusers, name))._get_compatibles()

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


def _plain(value: Any) -> Any:
    """An array, tensor or path as JSON holds it."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _config_file(path: Path, subfolder: str | None, name: str, hub: dict[str, Any]) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        for file in ([path / subfolder / name] if subfolder else []) + [path / name]:
            if file.is_file():
                return file
        raise OSError(f"no file {name} in {path / subfolder if subfolder else path}")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise OSError(f"{path} is no file or folder here, and a model on the hub needs huggingface_hub") from None
    return Path(hf_hub_download(path.as_posix(), filename=name, subfolder=subfolder, **hub))


def _join_diffusers() -> None:
    """Add diffusers' mixins to the bases, behind our own, if it is imported and they are not yet there."""
    diffusers = sys.modules.get("diffusers")
    if diffusers is None or len(ConfigObject.__bases__) > 1:
        return
    mixins = [getattr(diffusers, name, None) for name in ("SchedulerMixin", "ConfigMixin")]
    if all(isinstance(mixin, type) for mixin in mixins):
        ConfigObject.__bases__ = (_Root, *mixins)  # type: ignore[arg-type]
