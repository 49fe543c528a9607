"""Adapters in the files of PEFT: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path

from flax import nnx
from jax.sharding import Mesh

from experiments.errors import UserError, reading
from experiments.lora import TARGETS, LoRALinear, add_lora, find_layers
from experiments.models.decoder import Decoder
from experiments.models.tensors import read_params, write_params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Settings of PEFT that would change the outputs -> the values that mean that they do not.
_OFF = {
    "alora_invocation_tokens": (None,),
    "alpha_pattern": (None, {}),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    # Others, such as PiSSA's, change the base model when PEFT loads them.
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    "layers_to_transform": (None,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "use_dora": (False,),
    "use_rslora": (False,),
}


def save_adapters(model: Decoder, folder: str | Path, *, base: str | None = None) -> None:
    """Writes a model's adapters to a folder that `load_adapters` and `peft` load.

    Args:
      model: A model that went through `lora.add_lora`.
      folder: The folder; it is made where it is missing.
      base: Where the model without adapters is to be found, for the reader's information.

    Raises:
      ValueError: The model has no adapters, or some of another rank or scale than the others.
    """
    layers = {name: layer for _, name, layer in find_layers(model, LoRALinear)}
    if not layers:
        raise ValueError("model has no adapters: call lora.add_lora first")
    kinds = {(x.lora_a.shape[-1], x.scaling, x.dropout.rate) for x in layers.values()}
    if len(kinds) > 1:
        raise ValueError(f"model has adapters of different (rank, scale, dropout): {kinds}")
    ((rank, scaling, dropout),) = kinds
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_alpha": scaling * rank,
        "lora_dropout": dropout,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(layers),
        "task_type": "CAUSAL_LM",
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    write_params(nnx.state(model, nnx.LoRAParam), folder / WEIGHTS)


def load_adapters(model: Decoder, folder: str | Path, *, mesh: Mesh | None = None) -> Decoder:
    """Adds the adapters of a folder to a model, in place.

    Args:
      model: A model without adapters.
      folder: What `save_adapters` or `peft` wrote.
      mesh: Where the model lives; None: on one device.

    Returns:
      The same model.

    Raises:
      ValueError: The model has adapters already.
      UserError: The folder holds no adapters, other ones than LoRA, or ones that do not fit.
    """
    if find_layers(model, LoRALinear):
        raise ValueError("model has adapters already: call lora.merge_lora first")
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: has no {name}")
    file = folder / CONFIG
    with reading(file):
        config = json.loads(file.read_text())
    if not isinstance(config, dict):
        raise UserError(f"{file}: is no mapping")
    targets = config.get("target_modules")
    for name, allowed in {"peft_type": ("LORA",), **_OFF}.items():
        if config.get(name, allowed[0]) not in allowed:
            value = config[name]
            raise UserError(
                f"{folder}/{CONFIG}: {name}={value!r}: only {allowed[0]!r} is supported"
            )
    if not isinstance(targets, list) or not targets or set(targets) - set(TARGETS):
        allowed = ", ".join(TARGETS)
        raise UserError(f"{file}: target_modules={targets!r}: must be a list of {allowed}")
    missing = [name for name in ("r", "lora_alpha") if name not in config]
    if missing:
        raise UserError(f"{file}: lacks {', '.join(missing)}")
    with reading(file):
        add_lora(
            model,
            config["r"],
            config["lora_alpha"],
            dropout=config.get("lora_dropout", 0.0),
            targets=targets,
            # Only dropout keeps something of these: where its masks start from.
            rngs=nnx.Rngs(0),
        )
    adapters = nnx.state(model, nnx.LoRAParam)
    nnx.update(model, read_params(adapters, [folder / WEIGHTS], mesh=mesh))
    return model
