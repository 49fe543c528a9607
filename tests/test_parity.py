"""The decoder against PyTorch's Qwen2 and Llama, on random tiny models: same numbers everywhere.

Tolerances, absolute, for values of order one: 1e-5 in float32; in bfloat16, whose numbers have
three digits, 0.1 for logits (0.04 was measured), 0.01 for the loss, and a tenth of its norm for the
gradient of a tensor (0.04).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_helpers import LLAMA, QWEN
from safetensors.numpy import load_file

from experiments.models.decoder import rope_angles
from experiments.models.hf import load_pretrained, save_pretrained
from experiments.models.loss import next_token_loss
from experiments.models.tensors import write_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("cheap_compilation")

ATOL = 1e-5
T = 9
CONFIGS = {
    "qwen, grouped, tied": QWEN,
    "qwen, full, untied": dataclasses.replace(
        QWEN, num_key_value_heads=4, tie_word_embeddings=False, head_dim=6
    ),
    "llama, grouped, untied": LLAMA,
    "llama, one kv head, tied": dataclasses.replace(
        LLAMA, num_key_value_heads=1, tie_word_embeddings=True
    ),
}
SEGMENTS = {
    "whole rows": [[1] * 9, [1] * 9],
    "padded right": [[1] * 6 + [0] * 3, [1] * 9],
    "padded left": [[0] * 3 + [1] * 6, [1] * 9],
    "packed": [[1, 1, 1, 1, 2, 2, 3, 3, 3], [1, 1, 2, 2, 2, 2, 2, 0, 0]],
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """The same weights in PyTorch and here, by way of the files that PyTorch's model writes."""
    config = transformers.AutoConfig.for_model(**CONFIGS[request.param].to_hf())
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    ours = load_pretrained(folder)
    assert ours.config == CONFIGS[request.param]
    return theirs, ours, folder


def tokens():
    return np.random.default_rng(0).integers(0, QWEN.vocab_size, (2, T))


def run_torch(model, segments):
    """Logits and loss, with the documents told apart by PyTorch's own means."""
    segments = torch.tensor(segments)
    starts = torch.diff(segments, dim=1, prepend=segments.new_full((2, 1), -1)) != 0
    first = torch.cummax(torch.where(starts, torch.arange(T), 0), dim=1).values
    same = segments[:, :, None] == segments[:, None, :]
    allowed = same & torch.ones(T, T, dtype=torch.bool).tril()
    mask = torch.zeros(allowed.shape, dtype=model.dtype)
    mask = mask.masked_fill(~allowed, torch.finfo(model.dtype).min)[:, None]
    return model(
        torch.tensor(tokens()),
        attention_mask=mask,
        position_ids=torch.arange(T) - first,
        labels=torch.tensor(tokens()).masked_fill(starts | (segments == 0), -100),
    )


@functools.partial(jax.jit, static_argnums=0)
def run_jax(graphdef, params, tokens_bt, segments_bt):
    """Logits, loss and gradients."""

    def loss(params):
        return next_token_loss(nnx.merge(graphdef, params), tokens_bt, segments_bt, chunk=4)

    logits_btv = nnx.merge(graphdef, params)(tokens_bt, segments_bt)
    return logits_btv, *jax.value_and_grad(loss)(params)


@pytest.mark.parametrize("documents", SEGMENTS)
def test_logits_loss_and_gradients(pair, documents, tmp_path):
    theirs, ours, _ = pair
    segments = SEGMENTS[documents]
    theirs.zero_grad()
    expected = run_torch(theirs, segments)
    expected.loss.backward()
    segments = np.array(segments)
    logits, loss, grads = run_jax(*nnx.split(ours), tokens(), segments)
    real = segments > 0
    np.testing.assert_allclose(logits[real], expected.logits.detach()[real], atol=ATOL)
    np.testing.assert_allclose(loss, expected.loss.item(), atol=ATOL)
    write_params(grads, tmp_path / "grads")
    grads = load_file(tmp_path / "grads")
    expected = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, expected[name], atol=ATOL, err_msg=name)


def test_a_2d_attention_mask_is_padding_to_the_right(pair):
    theirs, ours, _ = pair
    segments = np.array(SEGMENTS["padded right"])
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens()), attention_mask=torch.tensor(segments)).logits
    logits, *_ = run_jax(*nnx.split(ours), tokens(), segments)
    np.testing.assert_allclose(logits[segments > 0], expected[segments > 0], atol=ATOL)


def test_modules(pair):
    theirs, ours, _ = pair
    graphdef, params = nnx.split(ours.layers)
    layer = nnx.merge(graphdef, jax.tree.map(lambda x: x[1], params))
    their_layer = theirs.model.layers[1]
    x_btd = np.random.default_rng(0).standard_normal((2, T, QWEN.hidden_size), np.float32)
    x = torch.tensor(x_btd)
    angles = rope_angles(jnp.arange(T)[None], ours.config.head_dim, ours.config.rope_theta)
    their_angles = theirs.model.rotary_emb(x, torch.arange(T)[None])
    for mine, his in zip(angles, their_angles, strict=True):
        np.testing.assert_allclose(np.tile(mine, 2), his, atol=ATOL)
    rope = {"position_embeddings": their_angles, "attention_mask": None}
    modules = {
        "attention": (
            lambda layer, x: layer.self_attn(x, *angles),
            lambda x: their_layer.self_attn(x, **rope)[0],
        ),
        "mlp": (lambda layer, x: layer.mlp(x), their_layer.mlp),
        "norm": (lambda layer, x: layer.input_layernorm(x), their_layer.input_layernorm),
        "layer": (lambda layer, x: layer(x, *angles), lambda x: their_layer(x, **rope)),
    }
    graphdef, params = nnx.split(layer)
    direction = np.random.default_rng(1).standard_normal(x_btd.shape, np.float32)
    for name, (mine, his) in modules.items():
        their_layer.zero_grad()
        their_x = torch.tensor(x_btd, requires_grad=True)
        expected = his(their_x)
        expected.backward(torch.tensor(direction))

        @jax.jit
        def run(params, x, mine=mine):
            found, pull = jax.vjp(lambda p, x: mine(nnx.merge(graphdef, p), x), params, x)
            return found, *pull(direction)

        found, grads, x_grad = run(params, x_btd)
        np.testing.assert_allclose(found, expected.detach(), atol=ATOL, err_msg=name)
        np.testing.assert_allclose(x_grad, their_x.grad, atol=ATOL, err_msg=name)
        for path, grad in nnx.to_flat_state(grads):
            leaf = "weight" if path[-1] == "kernel" else path[-1]
            theirs_too = their_layer.get_parameter(".".join((*path[:-1], leaf))).grad
            grad = grad[...].T if path[-1] == "kernel" else grad[...]
            shown = np.zeros_like(grad) if theirs_too is None else theirs_too
            np.testing.assert_allclose(grad, shown, atol=ATOL, err_msg=f"{name}, {path}")


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


BFLOAT16 = {
    "all in bfloat16": (torch.bfloat16, jnp.bfloat16),
    # As near to PyTorch's float32 as bfloat16 is.
    "float32 weights": (torch.float32, jnp.float32),
}


@pytest.mark.parametrize("weights", BFLOAT16)
@pytest.mark.parametrize("documents", SEGMENTS)
def test_bfloat16(pair, documents, weights, tmp_path):
    their_dtype, param_dtype = BFLOAT16[weights]
    _, _, folder = pair
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=their_dtype)
    segments = SEGMENTS[documents]
    expected = run_torch(theirs, segments)
    expected.loss.backward()
    ours = load_pretrained(folder, dtype=jnp.bfloat16, param_dtype=param_dtype)
    logits, loss, grads = run_jax(*nnx.split(ours), tokens(), np.array(segments))
    real = np.array(segments) > 0
    np.testing.assert_allclose(logits[real], expected.logits.detach().float()[real], atol=0.1)
    np.testing.assert_allclose(loss, expected.loss.item(), atol=0.01)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype(param_dtype)}
    write_params(jax.tree.map(lambda g: g.astype(jnp.float32), grads), tmp_path / "grads")
    their_grads = {name: p.grad.float().numpy() for name, p in theirs.named_parameters()}
    errors = {
        name: relative_error(grad, their_grads[name])
        for name, grad in load_file(tmp_path / "grads").items()
    }
    assert max(errors.values()) < 0.1, errors


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_written_is_read_by_transformers(pair, tmp_path, dtype):
    _, _, folder = pair
    ours = load_pretrained(folder, param_dtype=dtype)
    save_pretrained(ours, tmp_path)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert back.dtype == (torch.float32 if dtype == jnp.float32 else torch.bfloat16)
    first = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=back.dtype)
    with torch.no_grad():
        assert torch.equal(*(model(torch.tensor(tokens())).logits for model in (back, first)))
