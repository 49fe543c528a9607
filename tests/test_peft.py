"""Adapters in PEFT's files: the same logits there and here, whoever wrote them."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from model_helpers import FAMILIES, QWEN, decoder

from experiments import peft_format
from experiments.errors import UserError
from experiments.lora import TARGETS, add_lora, merge_lora
from experiments.models.hf import save_pretrained
from experiments.peft_format import load_adapters, save_adapters

pytestmark = pytest.mark.usefixtures("cheap_compilation")

TOKENS = np.random.default_rng(0).integers(0, QWEN.vocab_size, (2, 9))
RANK, ALPHA = 3, 6.0

forward = nnx.jit(lambda model: model(TOKENS))


def adapted(config, **settings):
    """A model whose adapters do something, as after training."""
    model = add_lora(decoder(config), RANK, ALPHA, rngs=nnx.Rngs(2), **settings)
    for path, adapter in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        seed = jax.random.key(sum(map(ord, "".join(path))))
        adapter.set_value(0.3 * jax.random.normal(seed, adapter.shape))
    return model


def test_what_is_written_is_read(tmp_path):
    model = adapted(QWEN, dropout=0.25, targets=("q_proj", "down_proj"))
    save_adapters(model, tmp_path)
    loaded = load_adapters(decoder(QWEN), tmp_path)
    flat, flat_loaded = (
        dict(nnx.to_flat_state(nnx.state(m, nnx.LoRAParam))) for m in (model, loaded)
    )
    assert flat.keys() == flat_loaded.keys()
    for path, adapter in flat.items():
        np.testing.assert_array_equal(flat_loaded[path][...], adapter[...], err_msg=str(path))
    layer = loaded.layers.mlp.down_proj
    assert (layer.scaling, layer.dropout.rate) == (ALPHA / RANK, 0.25)


# peft asks transformers for a property by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@FAMILIES
def test_both_directions_with_peft(tmp_path, config):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    save_pretrained(decoder(config), tmp_path / "base")

    def base():
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")

    def logits(model):
        with torch.no_grad():
            return model(torch.tensor(TOKENS)).logits

    ours = adapted(config)
    save_adapters(ours, tmp_path / "ours", base=str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "ours")
    np.testing.assert_allclose(forward(ours), logits(theirs), atol=1e-5)
    merged = logits(theirs.merge_and_unload())
    np.testing.assert_allclose(forward(merge_lora(ours)), merged, atol=1e-5)

    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=["v_proj", "up_proj"], task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(base(), settings)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapters(decoder(config), tmp_path / "theirs")
    np.testing.assert_allclose(forward(ours), logits(theirs), atol=1e-5)
    assert float(abs(forward(ours) - forward(decoder(config))).max()) > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"use_dora": True}, "use_dora=True: only False is supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa': only True is supported"),
        ({"target_modules": "all-linear"}, "target_modules='all-linear'"),
        ({"target_modules": ["lm_head"]}, f"must be a list of {', '.join(TARGETS)}"),
        ({"r": RANK + 1}, r"lora_A\.weight has the shape"),
        ({"r": 0}, r"adapter_config\.json: cannot be read \(rank=0: must be at least 1\)"),
        ({"lora_alpha": None}, r"adapter_config\.json: cannot be read"),
    ],
)
def test_other_adapters_are_refused(tmp_path, change, message):
    save_adapters(adapted(QWEN, targets=("q_proj",)), tmp_path)
    config = json.loads((tmp_path / peft_format.CONFIG).read_text())
    (tmp_path / peft_format.CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        load_adapters(decoder(QWEN), tmp_path)


def test_adapters_of_two_kinds(tmp_path):
    model = adapted(QWEN, targets=("q_proj",))
    save_adapters(model, tmp_path)
    with pytest.raises(ValueError, match="adapters already"):
        load_adapters(model, tmp_path)
    add_lora(model, 1, 7.0, targets=("v_proj",), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="different"):
        save_adapters(model, tmp_path)
    (tmp_path / peft_format.CONFIG).write_text('{"target_modules": ["q_proj"]}')
    with pytest.raises(UserError, match="lacks r, lora_alpha"):
        load_adapters(decoder(QWEN), tmp_path)
    (tmp_path / peft_format.CONFIG).write_text("[]")
    with pytest.raises(UserError, match=r"adapter_config\.json: is no mapping"):
        load_adapters(decoder(QWEN), tmp_path)


def test_nothing_to_save_or_load(tmp_path):
    with pytest.raises(ValueError, match="add_lora"):
        save_adapters(decoder(QWEN), tmp_path)
    with pytest.raises(UserError, match=r"has no adapter_config\.json"):
        load_adapters(decoder(QWEN), tmp_path)
