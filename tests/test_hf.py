"""Hugging Face folders: what is read, what is refused, what is written, where it goes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_helpers import FAMILIES, QWEN, decoder
from safetensors.numpy import load_file, save_file

from experiments.errors import UserError
from experiments.lora import add_lora
from experiments.models import hf
from experiments.models.hf import load_pretrained, save_pretrained
from experiments.models.sharding import make_mesh, shardings

pytestmark = pytest.mark.usefixtures("cheap_compilation")


def assert_same_params(model, expected):
    flat, flat_expected = (dict(nnx.to_flat_state(nnx.state(m))) for m in (model, expected))
    assert flat.keys() == flat_expected.keys()
    for path, variable in flat.items():
        assert variable.dtype == flat_expected[path].dtype
        np.testing.assert_array_equal(variable[...], flat_expected[path][...], err_msg=str(path))


@pytest.fixture
def folder(tmp_path):
    save_pretrained(decoder(QWEN), tmp_path)
    return tmp_path


@FAMILIES
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_written_is_read(tmp_path, config, dtype):
    model = decoder(config, dtype)
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(str(tmp_path), param_dtype=dtype, remat="full")
    assert loaded.config == config
    assert loaded.remat == "full"
    assert_same_params(loaded, model)


def test_dtype_of_the_file_does_not_matter(tmp_path):
    model = decoder(QWEN, jnp.bfloat16)
    save_pretrained(model, tmp_path)
    wide = load_pretrained(tmp_path)
    kernel = wide.layers.mlp.up_proj.kernel
    assert kernel.dtype == jnp.float32
    np.testing.assert_array_equal(kernel[...], model.layers.mlp.up_proj.kernel[...])


@FAMILIES
def test_parameters_go_straight_to_their_place(tmp_path, config, monkeypatch):
    model = decoder(config)
    save_pretrained(model, tmp_path)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    monkeypatch.setattr(jax, "device_put", None)
    loaded = load_pretrained(tmp_path, mesh=mesh)
    state = nnx.state(loaded)
    assert jax.tree.map(lambda x: x.sharding, state) == shardings(state, mesh)
    kernel = loaded.layers.mlp.down_proj.kernel[...]
    assert kernel.addressable_shards[0].data.shape == (2, 12, 8)
    assert_same_params(loaded, model)


def test_a_model_in_parts(folder):
    tensors = load_file(folder / hf.WEIGHTS)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, kept in parts.items():
        save_file({name: tensors[name] for name in kept}, folder / part)
    (folder / hf.WEIGHTS).unlink()
    weight_map = {name: part for part, kept in parts.items() for name in kept}
    (folder / hf.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same_params(load_pretrained(folder), decoder(QWEN))
    (folder / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks b\.safetensors"):
        load_pretrained(folder)


def test_every_misfit_is_named_at_once(folder):
    tensors = load_file(folder / hf.WEIGHTS)
    del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.q_proj.bias"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 3), np.float32)
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((24, 16), np.float32)
    save_file(tensors, folder / hf.WEIGHTS)
    with pytest.raises(UserError) as error:
        load_pretrained(folder)
    message = str(error.value)
    assert message.count(";") == 3
    assert "model.norm.weight is missing" in message
    assert "model.layers.1.self_attn.q_proj.bias is missing" in message
    assert "model.layers.0.mlp.up_proj.weight has the shape (3, 3) instead of (24, 16)" in message
    assert "model.layers.2.mlp.up_proj.weight has no place" in message


def test_what_other_writers_leave_in_is_ignored(folder):
    tensors = load_file(folder / hf.WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    save_file(tensors, folder / hf.WEIGHTS)
    assert_same_params(load_pretrained(folder), decoder(QWEN))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type='yarn'"),
        ({"rope_parameters": {"type": "linear", "rope_theta": 1.0}}, "rope_type='linear'"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"rms_norm_eps": None}, "rms_norm_eps=None: must be a number"),
        ({"hidden_size": 16.0}, "hidden_size=16.0: must be a positive integer"),
        (
            {"head_dim": None, "num_attention_heads": 0},
            "num_attention_heads=0: must be a positive integer",
        ),
        ({"num_key_value_heads": 3}, r"config.json: num_attention_heads \(4\) must be a multiple"),
    ],
)
def test_another_architecture_is_refused(folder, change, message):
    config = json.loads((folder / hf.CONFIG).read_text())
    (folder / hf.CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        load_pretrained(folder)


def test_a_shape_that_is_not_all_there_is_refused(folder):
    config = json.loads((folder / hf.CONFIG).read_text())
    del config["hidden_size"], config["vocab_size"]
    (folder / hf.CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match="lacks hidden_size, vocab_size"):
        load_pretrained(folder)


def test_a_folder_without_the_files_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_pretrained(tmp_path)
    (tmp_path / hf.CONFIG).write_text(json.dumps(QWEN.to_hf()))
    with pytest.raises(UserError, match="has neither"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("name", [hf.CONFIG, hf.WEIGHTS])
def test_a_damaged_file_is_named(tmp_path, name):
    save_pretrained(decoder(QWEN), tmp_path)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=rf"{name}: cannot be read \(.+\)$"):
        load_pretrained(tmp_path)


def test_hub(folder, monkeypatch):
    def download(name, allow_patterns):
        if name != "someone/model":
            raise OSError("No such repository.\nLong explanation.")
        return str(folder)

    monkeypatch.setattr(hf, "snapshot_download", download)
    assert load_pretrained("someone/model").config == QWEN
    with pytest.raises(UserError, match=r"someone/else: .*No such repository\.$"):
        load_pretrained("someone/else")


def test_a_tied_head_that_is_another_is_refused(folder, monkeypatch):
    monkeypatch.setattr(hf, "_ROWS", 5)
    tensors = load_file(folder / hf.WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, folder / hf.WEIGHTS)
    with pytest.raises(UserError, match=r"lm_head\.weight is not model\.embed_tokens\.weight"):
        load_pretrained(folder)


def test_adapters_must_be_merged_before_saving(tmp_path):
    model = add_lora(decoder(QWEN), 2, 4.0, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="merge_lora"):
        save_pretrained(model, tmp_path)
