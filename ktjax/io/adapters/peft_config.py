"""adapter_config.json: reading the fields that decide what an adapter computes."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from ktjax.io.adapters.adapter import AdapterError, Strength

CONFIG_NAME = "adapter_config.json"

# Fields that change what is computed, and the values that leave it as it is here.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "use_bdlora": (False,),
    "modules_to_save": ([],),
    "trainable_token_indices": ([], {}),
    "layer_replication": ([],),
    "alora_invocation_tokens": ([],),
    "arrow_config": (),
}
# Ways to begin a training that keep the base weights; others (PiSSA, OLoRA, CorDA,
# LoftQ, LoRA-GA) change them, and such an adapter does not fit the original model.
_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")


class PeftConfig:
    """The content of an adapter_config.json, checked.

    Attributes:
      path: the file.
      base_model: `base_model_name_or_path`, or None.
      rslora: whether the scaling is alpha / √rank.
    """

    def __init__(self, directory: Path) -> None:
        """Read `directory`/adapter_config.json.

        Raises:
          AdapterError: there is none, or a field is missing, broken, or asks for
            something that is not built.
        """
        self.path = directory / CONFIG_NAME
        raw = _read(self.path)
        self.base_model = _text(raw.get("base_model_name_or_path"))
        self._parameters = _names(raw.get("target_parameters"))
        self.rslora = self._check_flag("use_rslora", raw.get("use_rslora"))
        self._refuse_unsupported(raw)
        self._rank = self._check_rank("r", raw.get("r"))
        self._alpha = self._check_alpha("lora_alpha", raw.get("lora_alpha"))
        self._ranks = self._patterns(raw, "rank_pattern", self._check_rank)
        self._alphas = self._patterns(raw, "alpha_pattern", self._check_alpha)

    @property
    def has_patterns(self) -> bool:
        """Whether some modules have a rank or an alpha of their own."""
        return bool(self._ranks or self._alphas)

    def strength(self, module: str) -> Strength:
        """Rank and alpha of the module or parameter with the full name `module`."""
        rank = _lookup(self._ranks, module, self._rank)
        alpha = _lookup(self._alphas, module, self._alpha)
        # alpha / √rank = (alpha √rank) / rank.
        return Strength(rank, alpha * math.sqrt(rank) if self.rslora else alpha)

    def target_name(self, module: str) -> str:
        """What the patterns are held against: a module's name, or its parameter's.

        PEFT adapts the weight of a module as a parameter where target_parameters says
        so, and then its patterns are about `module.weight`.
        """
        weight = f"{module}.weight"
        is_parameter = any(
            f".{weight}".endswith(f".{name}") for name in self._parameters
        )
        return weight if is_parameter else module

    def _refuse_unsupported(self, raw: dict[str, Any]) -> None:
        kind = raw.get("peft_type")
        if kind != "LORA":
            raise AdapterError(
                f'{self.path}: peft_type must be "LORA", got {kind!r}; other kinds of '
                "adapters are not supported"
            )
        for name, neutral in _NEUTRAL.items():
            value = raw.get(name)
            if value is not None and value not in neutral:
                raise AdapterError(f"{self.path}: {name} = {value!r} is not supported")
        start = raw.get("init_lora_weights", True)
        if start not in _INITIALISATIONS:
            raise AdapterError(
                f"{self.path}: init_lora_weights = {start!r} may have changed the base "
                "weights; convert the adapter to plain LoRA with PEFT first "
                "(save_pretrained with path_initial_model_for_weight_conversion)"
            )

    def _check_flag(self, where: str, value: Any) -> bool:
        if value not in (None, True, False):
            raise AdapterError(
                f"{self.path}: {where} must be true or false, got {value!r}"
            )
        return bool(value)

    def _check_rank(self, where: str, value: Any) -> int:
        # No upper limit: gate and up as one have twice the rank of either.
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise AdapterError(
                f"{self.path}: {where} must be a positive integer, got {value!r}"
            )
        return value

    def _check_alpha(self, where: str, value: Any) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise AdapterError(
                f"{self.path}: {where} must be a positive number, got {value!r}"
            )
        return value

    def _patterns(
        self, raw: dict[str, Any], name: str, check: Any
    ) -> dict[re.Pattern[str], Any]:
        """Regular expressions for the end of a module's name, as PEFT matches them."""
        value = raw.get(name) or {}
        if not isinstance(value, dict):
            raise AdapterError(f"{self.path}: {name} must be an object, got {value!r}")
        try:
            return {
                re.compile(rf"(?:.*\.)?(?:{key})"): check(f"{name}[{key!r}]", item)
                for key, item in value.items()
            }
        except re.error as error:
            raise AdapterError(
                f"{self.path}: {name} has a key that is no regular expression: {error}"
            ) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(
            f"{path}: no such file; expected an adapter's directory"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise AdapterError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise AdapterError(f"{path}: expected a JSON object")
    return raw


def _lookup(patterns: dict[re.Pattern[str], Any], name: str, default: Any) -> Any:
    found = (value for key, value in patterns.items() if key.fullmatch(name))
    return next(found, default)


def _names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    return tuple(map(str, value)) if isinstance(value, list) else ()


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
