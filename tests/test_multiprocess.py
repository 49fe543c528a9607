"""Two processes that share the batch and the parameters decide as one process does."""

import json
import pathlib
import socket
import subprocess
import sys

import pytest

TIMEOUT = 120

PROGRAM = """
import json
import sys

import jax

processes, index, port = map(int, sys.argv[1:])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4 // processes)
if processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(f"localhost:{port}", processes, index)
    except Exception as error:
        print("CANNOT START", repr(error))
        sys.exit(0)

import jax.numpy as jnp
import numpy as np
import optax

import lbw_optax

mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))


def put(x, *spec):
    sharding = jax.NamedSharding(mesh, jax.P(*spec))
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])


rng = np.random.default_rng(0)
params = {
    "w": put(np.float32(rng.standard_normal((8, 3))), "x", None),
    "b": put(np.zeros((1, 3), np.float32), None, None),
}
tx = lbw_optax.guard(optax.adam(0.3))


def loss_fn(params, x, y):
    return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)


@jax.jit
def step(params, state, x, y):
    value, grads = jax.value_and_grad(loss_fn)(params, x, y)
    updates, state = tx.update(grads, state, params, value=value)
    return optax.apply_updates(params, updates), state, value


state = tx.init(params)
losses = []
for i in range(12):
    x = np.float32(rng.standard_normal((16, 8)))
    y = np.float32(rng.standard_normal((16, 3)))
    if i == 4:
        x[13] = np.nan  # in the part of the last process
    if i == 8:
        y *= 1e6
    params, state, value = step(params, state, put(x, "x", None), put(y, "x", None))
    losses.append(float(value))
report = lbw_optax.report(state)
events = [[e.step, e.cause, e.regime_after, e.action] for e in lbw_optax.events(state)]
scales = [e.scale for e in lbw_optax.events(state)]
answer = {"actions": report.actions, "events": events, "scales": scales, "losses": losses}
print("ANSWER" + json.dumps(answer))
"""


def start(program, *args):
    return subprocess.Popen(
        [sys.executable, str(program), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=pathlib.Path(__file__).parents[1],
    )


def finish(processes):
    """Returns what each process printed; none is left behind."""
    try:
        outputs = [p.communicate(timeout=TIMEOUT) for p in processes]
    finally:
        for p in processes:
            if p.poll() is None:
                p.kill()
                p.communicate()
    for out, _ in outputs:
        if "CANNOT START" in out:
            pytest.skip(f"jax.distributed does not start here: {out.strip()}")
    answers = []
    for (out, errors), p in zip(outputs, processes, strict=True):
        assert p.returncode == 0, errors[-2000:]
        (line,) = [x for x in out.splitlines() if x.startswith("ANSWER")]
        answers.append(json.loads(line.removeprefix("ANSWER")))
    return answers


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_two_processes_decide_as_one(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    port = free_port()
    first, second = finish([start(program, 2, i, port) for i in range(2)])
    (alone,) = finish([start(program, 1, 0, 0)])
    assert first["actions"]["HOLD"] >= 1
    assert first["actions"]["HOLD"] + first["actions"]["BACKTRACK"] >= 2
    assert first["actions"]["SCALE"] >= 1
    assert json.dumps(first) == json.dumps(second)
    assert first["events"] == alone["events"]
    assert first["actions"] == alone["actions"]
    assert first["scales"] == pytest.approx(alone["scales"], rel=1e-4)
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-3, nan_ok=True)
