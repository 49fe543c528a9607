"""The suites quality and study at a size of seconds; the peers and the faults against numpy."""

import csv
import dataclasses
import json
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import strategies as st

import lbw_optax
from experiments import bench, faults, peers, presets, tasks
from experiments.command_line import main
from experiments.data import BYTE_VOCABULARY
from experiments.methods import baselines
from experiments.models.config import DecoderConfig
from experiments.models.decoder import Decoder
from experiments.networks import NETWORKS
from experiments.sections import drills, idle, networks, optimizers, problems, stress
from experiments.suites import study

TINY = presets.BenchPreset(
    model=DecoderConfig(8, 16, 1, 2, 1, 4, vocab_size=256),
    pretrain=presets.PretrainConfig(
        steps=4, batch_size=2, learning_rate=1e-3, chunk_steps=4, checkpoint_steps=4
    ),
    seq_len=8,
    batch_size=4,
    steps=20,
    seeds=(0, 1),
    rates=(1e-3, 1e-2, 1e-1),
    stressed_rates=1,
    idle_steps=5,
    idle_seeds=2,
    long_idle_steps=6,
    long_idle_seeds=1,
    problem_steps=50,
    network_steps=10,
    heldout_windows=2,
)

pytestmark = pytest.mark.usefixtures("cheap_compilation")


def is_variable(x):
    return isinstance(x, nnx.Variable)


def bigram_loss(vectors, tokens_bt):
    logits = vectors[tokens_bt[:, :-1]] @ vectors.T
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens_bt[:, 1:]).mean()


BIGRAM = tasks.Task(
    "scratch",
    lambda key: jax.random.normal(key, (256, 2)),
    bigram_loss,
    jnp.arange(1000) % 7,
    jnp.arange(36).reshape(1, 4, 9) % 7,
    TINY.batch_size,
    TINY.seq_len,
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """One cell of each kind, on a model with a single parameter array."""
    monkeypatch.setattr(bench, "language_tasks", lambda preset, names: {"scratch": BIGRAM})
    monkeypatch.setitem(presets.QUALITY_PRESETS, "tiny", lambda: TINY)
    monkeypatch.setitem(presets.STUDY_PRESETS, "tiny", lambda: TINY)
    names = ("AdamW", "AdamW, LR / 10", "Prodigy", "schedule-free AdamW", "guard(AdamW)")
    methods = {name: baselines(TINY.steps)[name] for name in names}
    monkeypatch.setattr(stress, "baselines", lambda steps: methods)
    monkeypatch.setattr(idle, "BATCH_DIVISORS", (1,))
    monkeypatch.setattr(drills, "VARIANTS", {})
    monkeypatch.setattr(optimizers, "INNER", {"Lion": (optax.lion, (1e-3, 1e-2, 1e-1))})
    name = "scalar from 0 to 1"
    few = {"adam": optax.adam(1e-2)}
    problem = problems.PROBLEMS[name]()._replace(optimizers=few)
    monkeypatch.setattr(problems, "PROBLEMS", {name: lambda: problem})
    (probe,) = (make for make in NETWORKS if "probe" in make().name)
    monkeypatch.setattr(networks, "NETWORKS", (probe,))


def test_quality(tmp_path, capsys, monkeypatch):
    command = ["quality", "--preset", "tiny", "--results", str(tmp_path), "--tasks", "scratch"]
    assert main(command) == 0
    folder = tmp_path / "quality" / "tiny"
    files = {"config.json", "report.md", "rows.jsonl", "stress.png", "summary.csv"}
    assert {path.name for path in folder.iterdir()} == files
    with (folder / "summary.csv").open() as file:
        sections = {row["section"] for row in csv.DictReader(file)}
    assert sections == {
        "stress",
        "idle",
        "problems",
        "networks",
        "warmups",
        "faults",
        "optimizers",
        "schedules",
    }
    report = (folder / "report.md").read_text()
    assert "python -m experiments" in report
    assert "Bars missed" in report

    # Finished cells are reused; sections run alone; what is half measured is measured.
    rows = (folder / "rows.jsonl").read_text()
    monkeypatch.setattr(bench, "sweep", None)
    assert main([*command, "--sections", "stress", "idle"]) == 0
    assert (folder / "rows.jsonl").read_text() == rows
    assert main([*command, "--sections", "stres"]) == 2
    assert "--sections stres: unknown" in capsys.readouterr().err
    # The tables of some methods alone have AdamW and the guard, too.
    assert main([*command, "--sections", "stress", "--methods", "Prodigy"]) == 0
    table = capsys.readouterr().out
    assert "Prodigy" in table
    assert "schedule-free" not in table
    for method in ("AdamW", "Prodigy", "guard(AdamW)"):
        assert f"\n| {method} |" in (folder / "report.md").read_text()
    assert main([*command, "--methods", "Prodigi"]) == 2
    assert "--methods 'Prodigi': unknown" in capsys.readouterr().err
    assert main([*command[:-1], "lore"]) == 2
    assert "--tasks lore: unknown" in capsys.readouterr().err
    assert main([*command[:-1], "words", "--sections", "faults"]) == 2
    assert "nothing to measure" in capsys.readouterr().err


def test_study(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "SETTINGS", {})
    monkeypatch.setattr(study, "SCALED", ("growth",))
    command = ["study", "--preset", "tiny", "--results", str(tmp_path), "--tasks", "scratch"]
    assert main(command) == 0
    folder = tmp_path / "study" / "tiny"
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    columns = len(study.COLUMNS)
    for variant in (study.DEFAULTS, "no envelope", "growth x2"):
        assert len([row for row in rows if row["extra"] == variant]) == columns * len(TINY.seeds)
    assert "no envelope" in (folder / "report.md").read_text()


def test_tasks_train_what_they_say(monkeypatch):
    def untrained(config, *args):
        return Decoder(config, rngs=nnx.Rngs(0))

    monkeypatch.setattr(tasks, "pretrained", untrained)
    found = tasks.language_tasks(TINY)
    assert tuple(found) == tasks.TASKS
    shapes = {name: jax.eval_shape(task.init, jax.random.key(0)) for name, task in found.items()}
    sizes = {name: sum(x.size for x in jax.tree.leaves(s)) for name, s in shapes.items()}
    assert sizes["full"] == sizes["scratch"]
    width = TINY.model.hidden_size
    assert sizes["words"] - sizes["scratch"] == (tasks.VOCABULARY - BYTE_VOCABULARY) * width
    usual = jax.tree.leaves(found["usual"].init(jax.random.key(0)))
    assert {round(float(x.std()), 6) for x in usual} == {0.0, tasks.USUAL_DEVIATION}
    kinds = {type(x) for x in jax.tree.leaves(shapes["lora"], is_leaf=is_variable)}
    assert kinds == {nnx.LoRAParam}
    for name, task in found.items():
        batch = task.batch(jax.random.key(0), 0.0)
        assert jax.eval_shape(task.loss, shapes[name], batch).shape == ()


@pytest.mark.parametrize("make", NETWORKS, ids=lambda make: make.__name__)
def test_a_step_of_a_network_lowers_the_loss_of_its_batch(make):
    network = make()

    @jax.jit
    def losses():
        batch = network.batch(jax.random.key(1), 0.0)
        params = network.init(jax.random.key(0))
        loss, grads = jax.value_and_grad(network.loss)(params, batch)
        tx = optax.adam(1e-4)
        updates, _ = tx.update(grads, tx.init(params), params)
        return loss, network.loss(optax.apply_updates(params, updates), batch)

    before, after = losses()
    assert after < before


def test_study_changes_every_constant_within_its_range():
    variants = study.law_variants()  # Raises where a value is out of range.
    defaults = dataclasses.asdict(lbw_optax.Law())
    for name, default in defaults.items():
        (less,), (more,) = variants[f"{name} x0.5"].values(), variants[f"{name} x2"].values()
        assert less < default < more


def feed(tx, grads, **extra):
    """The updates for a stream of gradients of a single leaf, with `extra` per step."""

    def body(state, now):
        g, more = now
        updates, state = tx.update(g, state, jnp.ones(grads.shape[1:]), **more)
        return state, updates

    stream = (jnp.asarray(grads, jnp.float32), {k: jnp.asarray(v) for k, v in extra.items()})
    return np.asarray(jax.lax.scan(body, tx.init(jnp.ones(grads.shape[1:])), stream)[1])


@pytest.fixture
def spiky():
    """200 gradients of three entries, with spikes; and their losses, with jumps."""
    rng = np.random.default_rng(0)
    grads, loss = 0.1 * rng.normal(size=(200, 3)), 2 + 0.1 * rng.normal(size=200)
    grads[[10, 90, 150]] *= [[30], [100], [1000]]
    loss[[20, 120]] += 5
    return grads.astype(np.float32), loss.astype(np.float32)


def test_zclip_is_its_formula(spiky):
    grads, _ = spiky
    first = np.linalg.norm(grads[:25].astype(float), axis=1)
    mean, variance = first.mean(), first.var()
    expected = []
    for step, g in enumerate(grads.astype(float)):
        norm = np.linalg.norm(g)
        clipped = min(norm, 1.0)
        if step >= 25:
            z = (norm - mean) / (np.sqrt(variance) + 1e-6)
            if z > 2.5:
                clipped = min(norm, mean + 2.5 * np.sqrt(variance) / (z / 2.5), 1.0)
            mean = 0.97 * mean + 0.03 * clipped
            variance = 0.97 * variance + 0.03 * (clipped - mean) ** 2
        expected.append(g * clipped / norm)
    np.testing.assert_allclose(feed(peers.zclip(), grads), expected, rtol=1e-3)


def test_skip_step_is_its_rule(spiky):
    grads, loss = spiky
    norms = np.linalg.norm(grads, axis=1)
    expected, moment = [], np.zeros(3)
    for step, g in enumerate(grads):
        seen = slice(max(step - 128, 0), step)
        fine = step < 64 or all(
            x[step] <= x[seen].mean() + 6 * x[seen].std() for x in (loss, norms)
        )
        moment = 0.9 * moment + g if fine else moment
        expected.append(-0.1 * moment if fine else np.zeros(3))
    assert [step for step, u in enumerate(expected) if not u.any()] == [90, 120, 150]
    tx = peers.skip_step(optax.sgd(0.1, momentum=0.9))
    np.testing.assert_allclose(feed(tx, grads, value=loss), expected, rtol=1e-4, atol=1e-7)


def test_stable_adamw_is_its_formula(spiky):
    grads, _ = spiky
    m = v = 0
    expected = []
    for step, g in enumerate(grads.astype(float), start=1):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        m_hat, v_hat = m / (1 - 0.9**step), v / (1 - 0.99**step)
        rate = 0.1 / max(1, np.sqrt(np.mean(g**2 / np.maximum(v_hat, 1e-12))))
        expected.append(-rate * (m_hat / (np.sqrt(v_hat) + 1e-6) + 0.01))
    np.testing.assert_allclose(feed(peers.stable_adamw(0.1), grads), expected, rtol=1e-3)


def test_per_layer_is_what_each_layer_alone_gets():
    rng = np.random.default_rng(0)
    layers = [
        {"w": rng.standard_normal((3, 2)) * scale, "b": rng.standard_normal(2)} for scale in (1, 9)
    ]
    layers = jax.tree.map(jnp.float32, layers)
    stacked = {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers), "head": jnp.ones((2, 2))}
    for inner in (peers.stable_adamw(0.1), optax.adaptive_grad_clip(0.01)):
        tx = peers.per_layer(inner)
        grads = jax.tree.map(lambda p: 2 * p + 1, stacked)
        found, _ = tx.update(grads, tx.init(stacked), stacked)
        for i, params in enumerate(layers):
            alone = {key: grads["layers"][key][i] for key in params}
            expected, _ = inner.update(alone, inner.init(params), params)
            for key, value in expected.items():
                np.testing.assert_allclose(found["layers"][key][i], value, rtol=1e-6)


class TestFaults:
    STEPS = 100

    def hits(self, fault):
        steps = jnp.arange(self.STEPS)
        key = jax.random.key(0)
        hit = jax.vmap(lambda step: faults.is_hit(fault, key, step))(steps)
        return np.flatnonzero(hit)

    def spoiled(self, fault):
        """Loss and gradients of a hit step."""
        grads = {"a": jnp.ones((2, 2)), "b": jnp.full(2, -2.0)}
        step = jnp.int32(self.hits(fault)[0])
        return faults.spoil_gradients(fault, jax.random.key(0), step, jnp.float32(1), grads)

    def test_hits_where_and_as_often_as_it_says(self):
        drill = faults.drills(self.STEPS)
        assert self.hits(drill["none"]).size == 0
        assert self.hits(drill["gradient x1e6, 3 steps"]).size == 3
        assert self.hits(drill["gradient x1e6, 3 steps"]).min() >= 10
        lasting = {
            "learning rate x30, 50 steps": 50,
            "20 % random tokens, 30 steps": 30,
            "20 % random sequences, 30 steps": 30,
        }
        for name, steps in lasting.items():
            np.testing.assert_array_equal(self.hits(drill[name]), 50 + np.arange(steps))

    @hypothesis.given(st.integers(0, 20), st.integers(1, 80), st.integers(1, 80))
    def test_random_hits_are_as_many_as_it_says(self, start, length, hits):
        found = self.hits(faults.Fault(start, start + length, min(hits, length)))
        assert found.size == min(hits, length)
        assert start <= found.min() <= found.max() < start + length

    def test_gradients_and_loss(self):
        drill = faults.drills(self.STEPS)
        loss, grads = self.spoiled(drill["NaN gradient, 1 % of steps"])
        assert loss == 1
        assert all(np.isnan(g).all() for g in jax.tree.leaves(grads))
        _, grads = self.spoiled(drill["Inf gradient, 1 % of steps"])
        assert all(np.isinf(g).all() for g in jax.tree.leaves(grads))
        loss, grads = self.spoiled(drill["NaN loss, 1 % of steps"])
        assert math.isnan(loss)
        np.testing.assert_array_equal(grads["a"], 1)
        _, grads = self.spoiled(drill["gradient x1e6, 3 steps"])
        np.testing.assert_array_equal(grads["b"], -2e6)
        _, grads = self.spoiled(drill["one entry 1e25, 1 step"])
        np.testing.assert_array_equal(grads["a"], [[np.float32(1e25), 1], [1, 1]])
        np.testing.assert_array_equal(grads["b"], -2)

    def test_other_steps_are_untouched(self):
        fault = faults.Fault(5, 6, gradient=math.nan, entry=1e25, loss=math.nan, rate=30.0)
        key, step = jax.random.key(0), jnp.int32(4)
        grads = {"a": jnp.ones(3)}
        loss, same = faults.spoil_gradients(fault, key, step, jnp.float32(1), grads)
        assert loss == 1
        np.testing.assert_array_equal(same["a"], 1)
        assert faults.rate_factor(fault, key, step) == 1
        assert faults.rate_factor(fault, key, jnp.int32(5)) == 30

    def test_tokens(self):
        fault = faults.Fault(0, 10, tokens=0.2)
        tokens = jnp.full((100, 100), 7)
        seen = faults.spoil_batch(fault, jax.random.key(0), jnp.int32(3), tokens, 256)
        assert 0.17 < np.mean(seen != 7) < 0.22
        same = faults.spoil_batch(fault, jax.random.key(0), jnp.int32(10), tokens, 256)
        np.testing.assert_array_equal(same, 7)

    def test_sequences(self):
        fault = faults.Fault(0, 10, sequences=0.2)
        tokens = jnp.full((1000, 30), 7)
        seen = faults.spoil_batch(fault, jax.random.key(0), jnp.int32(3), tokens, 256)
        share = np.mean(seen != 7, axis=1)
        assert 0.15 < np.mean(share > 0) < 0.25
        assert share[share > 0].min() > 0.8
        same = faults.spoil_batch(fault, jax.random.key(0), jnp.int32(10), tokens, 256)
        np.testing.assert_array_equal(same, 7)


def test_seeds_can_be_chosen(tmp_path, capsys):
    presets = {"tiny": lambda: TINY}
    chosen = bench.Bench("quality", "tiny", presets, ("scratch",), (5,), tmp_path, False)
    assert dataclasses.replace(TINY, seeds=(5,)) == chosen.preset
    assert main(["quality", "--results", str(tmp_path), "--seeds", "1", "1"]) == 2
    assert "--seeds 1 1: must differ from each other" in capsys.readouterr().err
