"""The base model of the suites: pretrained once, then taken from the cache."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from experiments.batches import CroppedBatches
from experiments.checkpoint import Checkpoints, cache_folder
from experiments.corpus import TRAIN, Corpus, wikitext
from experiments.data import Text, split, standard_library
from experiments.environment import versions
from experiments.errors import UserError
from experiments.jobs import PretrainConfig
from experiments.locks import alone_in
from experiments.methods import pretraining
from experiments.models.config import DecoderConfig
from experiments.models.decoder import Decoder
from experiments.train import Metrics, Trainer


def text_to_train_on(corpus: Corpus) -> Text:
    """The documents that a corpus has for training, one after the other, each on a new line."""
    documents = corpus.documents(TRAIN)
    text = "\n".join(document.removesuffix("\n") for document in documents)
    return Text(documents.name, text.encode())


def _library() -> Text:
    """The standard library without its last tenth, on which no model here was ever trained."""
    whole = standard_library()
    kept, _ = split(whole, seq_len=1)
    return Text(whole.name, kept.tobytes())


TEXTS: dict[str, Callable[[], Text]] = {
    "standard-library": _library,
    "wikitext-2": lambda: text_to_train_on(wikitext(2, "--pretrain-data")),
}
"""Name in `PretrainConfig.text` -> the text."""


def pretrained(
    config: DecoderConfig,
    dtype: str,
    seq_len: int,
    recipe: PretrainConfig,
    text: Text | None = None,
) -> nnx.Module:
    """A decoder pretrained on a text, with a progress bar where that is still to be done.

    Interrupted pretraining goes on from its last checkpoint.

    Args:
      config: Shape of the decoder.
      dtype: Its compute dtype.
      seq_len: Predicted tokens per sequence.
      recipe: How it is trained. The seed is always 0, so that all seeds of a suite share a model.
      text: What it is trained on; None takes the recipe's.

    Returns:
      The model.
    """
    text = text or TEXTS[recipe.text]()
    if len(text.content) <= seq_len:
        raise UserError(f"{text.name}: {len(text.content)} bytes, but {seq_len + 1} are needed")
    model = Decoder(config, dtype=jnp.dtype(dtype), remat=recipe.remat, rngs=nnx.Rngs(0))
    graphdef, params, frozen = nnx.split(model, nnx.Param, ...)
    ingredients = {
        "config": dataclasses.asdict(config),
        "dtype": dtype,
        "seq_len": seq_len,
        "recipe": dataclasses.asdict(recipe) | {"text": text.sha256},
        # Another version of the decoder may keep the same numbers elsewhere.
        "parameters": [
            [jax.tree_util.keystr(path), *leaf.shape]
            for path, leaf in jax.tree.leaves_with_path(params)
        ],
        "device": jax.devices()[0].device_kind,
        # The guard has no part in it.
        "versions": {k: v for k, v in versions().items() if k != "lbw_optax"},
    }
    digest = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder() / f"pretrained-{digest}"
    trainer = Trainer(
        graphdef,
        functools.partial(pretraining, steps=recipe.steps),
        chunk_steps=recipe.chunk_steps,
        vocabulary=config.vocab_size,
    )
    batches = CroppedBatches(
        np.frombuffer(text.content, np.uint8),
        jax.random.key(0),
        batch_size=recipe.batch_size,
        seq_len=seq_len,
    )
    with alone_in(folder):
        checkpoints = Checkpoints(folder)
        state = checkpoints.restore_or(trainer.init(params, recipe.learning_rate))
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
