"""Fine-tuning jobs of the suites: every number that a result depends on, in one place.

The paper leaves most of its settings unknown; `_paper` states what is assumed for them.
"""

from __future__ import annotations

import dataclasses

from experiments.data import BYTE_VOCABULARY
from experiments.lora import TARGETS
from experiments.methods import at_multiple
from experiments.models.config import DecoderConfig
from experiments.models.zoo import TINYLLAMA


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """How a base model is made from random values."""

    steps: int
    """Number of steps, a multiple of `chunk_steps`."""
    batch_size: int
    """Sequences per step."""
    learning_rate: float
    """Peak of the cosine schedule."""
    chunk_steps: int
    """Steps per call of the compiled function."""
    checkpoint_steps: int
    """Steps between checkpoints, a multiple of `chunk_steps`."""
    text: str = "standard-library"
    """What is trained on: a name that `experiments.pretrain` knows."""
    remat: str = "none"
    """What is computed again in the backward pass: none, dots or full."""


@dataclasses.dataclass(frozen=True)
class Base:
    """The model that is fine-tuned: a checkpoint, or one that is pretrained here."""

    name: str
    """What reports call it; the name of a checkpoint on the hub where nothing is pretrained."""
    config: DecoderConfig | None = None
    """Shape of the model that is pretrained here."""
    recipe: PretrainConfig | None = None
    """How."""
    dtype: str = "float32"
    """Compute dtype of the pretraining; parameters are float32."""
    llama2c: tuple[str, str] | None = None
    """File names of model and tokenizer, of a checkpoint in the format of llama2.c."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which corrections are trained."""

    rank: int = 8
    """Width of the corrections; 8 is the default of the LoRA paper and of PEFT."""
    alpha: float = 16.0
    """Scale of the corrections, in units of the rank: twice the rank, a common choice."""
    targets: tuple[str, ...] = TARGETS
    """Names of the linear layers that get one."""
    dropout: float = 0.0
    """Probability that an entry of a correction's input is dropped while training; the default is
    PEFT's."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A fine-tune: of what, on what, how long. Methods, learning rates and seeds vary in it."""

    base: Base
    """The model."""
    corpus: str
    """What is trained on and held out: a name that `experiments.corpus` knows."""
    reference_lr: float
    """The learning rate that the multiples of a suite count from: AdamW's best, where known."""
    steps: int
    """Number of steps, a multiple of `chunk_steps`."""
    batch_size: int
    """Sequences per step."""
    seq_len: int
    """Predicted tokens per sequence."""
    chunk_steps: int
    """Steps per call of the compiled function."""
    checkpoint_steps: int
    """Steps between checkpoints, a multiple of `chunk_steps`."""
    heldout_batch_size: int
    """Held-out windows that the model sees at once."""
    heldout_tokens: int | None = None
    """Most held-out tokens that are scored; by default the whole split."""
    stride: int | None = None
    """Tokens between the starts of held-out windows; by default `seq_len`, without overlap."""
    lora: LoraConfig | None = LoraConfig()
    """The corrections that train; by default of rank 8. None trains every parameter."""
    dtype: str = "float32"
    """Compute dtype."""
    param_dtype: str = "float32"
    """Dtype of what trains and of the optimizer's state."""
    attention: str = "xla"
    """Implementation of the attention: xla or cudnn."""
    remat: str = "none"
    """What is computed again in the backward pass: none, dots or full."""

    def __post_init__(self) -> None:
        """Checks that steps come in whole chunks."""
        for name in ("steps", "checkpoint_steps"):
            if getattr(self, name) % self.chunk_steps:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) must be a multiple of chunk_steps "
                    f"({self.chunk_steps})"
                )

    def rate(self, multiple: float) -> float:
        """A learning rate in units of the reference."""
        return at_multiple(self.reference_lr, multiple)


def byte_decoder(width: int, layers: int, heads: int, seq_len: int, **other) -> DecoderConfig:
    """A decoder over bytes like Qwen2.5's: two heads share keys and values, SwiGLU is 8/3 wide."""
    return DecoderConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=width // heads,
        vocab_size=BYTE_VOCABULARY,
        max_position_embeddings=seq_len,
        **other,
    )


NANO_RECIPE = PretrainConfig(
    steps=1000, batch_size=16, learning_rate=3e-3, chunk_steps=20, checkpoint_steps=500
)

NANO = Job(
    base=Base("decoder-0.2M", byte_decoder(96, 2, 4, 128), NANO_RECIPE),
    corpus="python-manual",
    # AdamW's held-out perplexity: 4.30 at 1e-3, 4.20 at 3e-3, 4.24 at 5e-3, 4.43 at 1e-2
    # (zero-step: 5.44).
    reference_lr=3e-3,
    steps=240,
    batch_size=8,
    seq_len=128,
    chunk_steps=20,
    checkpoint_steps=120,
    heldout_batch_size=32,
    heldout_tokens=32_768,
)
"""A LoRA fine-tune of a 0.2M-parameter byte model, for two CPU cores: 12 s a run."""

NANO_SHORT = dataclasses.replace(NANO, steps=200, batch_size=4)
"""The same with fewer tokens, for suites of many runs."""

SMALL_RECIPE = PretrainConfig(
    # The learning rate is GPT-3's for 125M parameters; 4000 steps are 12 epochs of the 11 MB.
    steps=4000,
    batch_size=64,
    learning_rate=6e-4,
    chunk_steps=50,
    checkpoint_steps=1000,
    text="wikitext-2",
    remat="dots",
)

SMALL = Job(
    base=Base("decoder-91M", byte_decoder(768, 14, 12, 1024), SMALL_RECIPE, "bfloat16"),
    corpus="python-manual",
    # A guess from LoRA practice (1e-4 to 1e-3), still to be tuned.
    reference_lr=3e-4,
    steps=500,
    batch_size=32,
    seq_len=512,
    chunk_steps=25,
    checkpoint_steps=250,
    heldout_batch_size=16,
    dtype="bfloat16",
    remat="dots",
)
"""A LoRA fine-tune of a 91M-parameter byte model on one GPU with 24 GB. Not run yet. The model is
pretrained on WikiText-2, which the hub has; `--pretrain-data` takes another text."""

STORIES = dataclasses.replace(
    NANO_SHORT,
    base=Base("stories260K", llama2c=("stories260K.bin", "tok512.bin")),
    corpus="wikitext-103",
)
"""A LoRA fine-tune of a Llama of 260,000 parameters that was pretrained on TinyStories: a really
trained model, small enough for two CPU cores. Its folder has to be at hand, see `--models`."""


def _paper(repo: str, reference_lr: float, lora: LoraConfig | None, param_dtype: str) -> Job:
    """A job of the paper, with what it does not say filled in.

    Known: WikiText-103, Qwen2.5-3B/7B/14B with LoRA, TinyLlama-1B with all its parameters,
    learning rates 1e-3 and 3e-3 for stress, final perplexity and end-to-end seconds, and that 7B
    took 392 s. Guessed from that time: 200 steps of 8 sequences of 512 tokens. Guessed from common
    practice: the base models, of TinyLlama the one after all its tokens; LoRA of rank 16 and alpha
    32 on all linear layers; a reference learning rate of 2e-4 (LoRA) or 2e-5 (all parameters);
    AdamW with optax's defaults and no schedule; bfloat16 compute, float32 for what trains; one
    seed; the whole test split held out in windows of 512 by 256.
    """
    return Job(
        base=Base(repo),
        corpus="wikitext-103",
        reference_lr=reference_lr,
        steps=200,
        batch_size=8,
        seq_len=512,
        chunk_steps=10,
        checkpoint_steps=100,
        heldout_batch_size=8,
        stride=256,
        lora=lora,
        dtype="bfloat16",
        param_dtype=param_dtype,
        remat="full",
    )


PAPER_LORA = LoraConfig(rank=16, alpha=32.0)
"""The guess for the paper's LoRA."""

PAPER = {
    "3B": _paper("Qwen/Qwen2.5-3B", 2e-4, PAPER_LORA, "float32"),
    "7B": _paper("Qwen/Qwen2.5-7B", 2e-4, PAPER_LORA, "float32"),
    "14B": _paper("Qwen/Qwen2.5-14B", 2e-4, PAPER_LORA, "float32"),
    "TinyLlama": _paper(TINYLLAMA, 2e-5, None, "float32"),
}
"""The paper's models."""
