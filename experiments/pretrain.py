"""The base model of the suites: pretrained once, then taken from the cache."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json

import jax
import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

from experiments.batches import CroppedBatches
from experiments.checkpoint import Checkpoints, cache_folder
from experiments.data import Text, split
from experiments.jobs import PretrainConfig
from experiments.methods import pretraining
from experiments.models.config import DecoderConfig
from experiments.models.decoder import Decoder
from experiments.train import Metrics, Trainer


def pretrained(
    config: DecoderConfig, dtype: str, seq_len: int, recipe: PretrainConfig, text: Text
) -> nnx.Module:
    """A decoder pretrained on a text, with a progress bar where that is still to be done.

    Interrupted pretraining goes on from its last checkpoint.

    Args:
      config: Shape of the decoder.
      dtype: Its compute dtype.
      seq_len: Predicted tokens per sequence.
      recipe: How it is trained. The seed is always 0, so that all seeds of a suite share a model.
      text: What it is trained on, less its held-out part.

    Returns:
      The model.
    """
    model = Decoder(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    graphdef, params, frozen = nnx.split(model, nnx.Param, ...)
    ingredients = {
        "config": dataclasses.asdict(config),
        "dtype": dtype,
        "seq_len": seq_len,
        "recipe": dataclasses.asdict(recipe),
        "text": text.sha256,
        # Another version of the decoder may keep the same numbers elsewhere.
        "parameters": [
            [jax.tree_util.keystr(path), *leaf.shape]
            for path, leaf in jax.tree.leaves_with_path(params)
        ],
        "device": jax.devices()[0].device_kind,
    }
    digest = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:16]
    checkpoints = Checkpoints(cache_folder() / f"pretrained-{digest}")

    trainer = Trainer(
        graphdef,
        functools.partial(pretraining, steps=recipe.steps),
        chunk_steps=recipe.chunk_steps,
        vocabulary=config.vocab_size,
    )
    state = checkpoints.restore_or(trainer.init(params, recipe.learning_rate))
    tokens, _ = split(text, seq_len)
    batches = CroppedBatches(
        tokens, jax.random.key(0), batch_size=recipe.batch_size, seq_len=seq_len
    )
    with tqdm(
        total=recipe.steps, initial=int(state.step), desc="pretraining", unit="step"
    ) as progress:

        def log(step: int, metrics: Metrics, seconds: float) -> None:
            progress.set_postfix(loss=f"{metrics.loss[-1]:.3f}", refresh=False)
            progress.update(len(metrics.loss))

        state = trainer.fit(
            state,
            frozen,
            batches,
            recipe.learning_rate,
            steps=recipe.steps,
            log=log,
            save=checkpoints.save,
            save_steps=recipe.checkpoint_steps,
        )
    checkpoints.close()
    return nnx.merge(graphdef, state.params, frozen)
