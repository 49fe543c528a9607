"""The transformation: wires sensing, interpretation, policy, actuation and ledger together."""

import numbers
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lbw_optax import (
    actuation,
    controller,
    envelope,
    interpretation,
    ledger,
    memory,
    policy,
    sensing,
    statistics,
)
from lbw_optax.interpretation import Cause
from lbw_optax.law import Law, is_number
from lbw_optax.policy import Action


class GuardState(NamedTuple):
    """The whole controller.

    Attributes:
      inner_state: the wrapped optimizer's state.
      last_step: what is remembered of the last applied step.
      regime: the current `Regime`.
      dwell: quiet steps spent in it in a row.
      stressed: whether it is `STRESS`, or was before an alarm.
      has_loss: whether the last update was given the loss.
      has_params: whether it was given the parameters.
      statistics: what the run has shown so far.
      controller: the policy's memory.
      ledger: what the guard did.
    """

    inner_state: Any
    last_step: Any
    regime: jax.Array  # shape=(), dtype=int32
    dwell: jax.Array  # shape=(), dtype=int32
    stressed: jax.Array  # shape=(), dtype=bool
    has_loss: jax.Array  # shape=(), dtype=bool
    has_params: jax.Array  # shape=(), dtype=bool
    statistics: statistics.Statistics
    controller: controller.Controller
    ledger: ledger.Ledger


def guard(
    inner: optax.GradientTransformation | optax.MultiSteps,
    *,
    memory: Literal["none", "sparse", "step"] = "step",
    min_scale: float = 1e-6,
    relative_step_limit: float = 1.0,
    max_rejections: int = 20,
    log_size: int = 128,
    axis_name: Any = None,
    law: Law | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Flies an optimizer by wire: senses each step, and bounds, holds or undoes a harmful one.

    With :math:`u_t` the step that ``inner`` makes of the gradients :math:`g_t` and :math:`s_t` the
    scale, the parameters move by

    .. math::

      d_t = \begin{cases}
        u_t & \text{healthy: the inner step, bit for bit} \\
        s_t u_t, \; s_t \in [\text{min\_scale}, 1] & \text{under stress} \\
        0 & \text{a bad observation: held, the inner state stays} \\
        -(1 - k) d_{t-1}, \; k \in (0, 1) & \text{the last step did harm: undone in part}
      \end{cases}

    and a step that is taken has :math:`\|d_t\| \le R \max(\|p_t\|, \sqrt{n})` with :math:`R`
    = ``relative_step_limit`` and :math:`n` the number of parameters, if need be below
    ``min_scale``. The controller lives in the optimizer state and runs inside jit.

    Args:
      inner: any optax transformation that ends in a step (a complete optimizer).
      memory: what is kept of the last applied step. ``"step"`` keeps all of it (as much memory as
        the parameters): exact overshoot, and the step can be undone. ``"sparse"`` keeps a sample
        (1/16, small leaves whole): overshoot is sensed, nothing can be undone. ``"none"`` keeps
        nothing.
      min_scale: lowest scale, in [1e-9, 1].
      relative_step_limit: longest step over the parameters' norm, whatever the sensors say, in
        [1e-6, 1e6].
      max_rejections: held or undone steps in a row before the run proceeds at ``min_scale``, an
        integer of at least 1.
      log_size: number of events that the log keeps, an integer of at least 1.
      axis_name: inside ``shard_map``, the mesh axes over which all leaves are split; their sums are
        then taken over the whole mesh. Not needed under ``jit``.
      law: the constants of the control law; the defaults are meant for every task.

    Returns:
      A transformation whose ``update`` takes the loss of the step as ``value=`` (or ``loss=``).
      At a step without it, or without ``params``, the sensors that need it are off and
      :func:`lbw_optax.report` says so.

    Raises:
      ValueError: if an argument is outside its range.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lbw_optax
      >>> tx = lbw_optax.guard(optax.adamw(1e-3))
      >>> params = {"w": jnp.ones(3)}
      >>> state = tx.init(params)
      >>> loss, grads = jax.value_and_grad(lambda p: jnp.sum(p["w"] ** 2))(params)
      >>> updates, state = tx.update(grads, state, params, value=loss)
      >>> params = optax.apply_updates(params, updates)
      >>> lbw_optax.report(state).regime
      'STABLE'

    References:
      Radianis, `Learn-by-Wire Training Control Governance
      <https://arxiv.org/abs/2605.19008>`_, 2026

    .. note::
      A plain optimizer's checkpoint is adopted with
      ``tx.init(params)._replace(inner_state=restored)``; ``state.inner_state`` releases it again.

    .. seealso::
      :func:`lbw_optax.report`, :func:`lbw_optax.events`
    """
    law = Law() if law is None else law
    _check(inner, memory, min_scale, relative_step_limit, max_rejections, log_size, axis_name, law)
    # Python's own numbers: numpy's would decide the dtypes of the state.
    limits = controller.Limits(float(min_scale), float(relative_step_limit), int(max_rejections))
    return _guard(inner, memory, limits, int(log_size), axis_name, law)


def _guard(inner, mode, limits, log_size, axis_name, law):
    if isinstance(inner, optax.MultiSteps):
        update: Any = inner.update  # It takes extra arguments, and does not say so.
        inner = optax.GradientTransformationExtraArgs(inner.init, update)
    inner = optax.with_extra_args_support(inner)
    can_undo = mode == "step"

    def init_fn(params):
        _check_real("guard: params", params)
        return GuardState(
            inner_state=inner.init(params),
            last_step=memory.allocate(mode, params),
            regime=jnp.zeros([], jnp.int32),
            dwell=jnp.zeros([], jnp.int32),
            stressed=jnp.zeros([], bool),
            has_loss=jnp.zeros([], bool),
            has_params=jnp.zeros([], bool),
            statistics=statistics.init_statistics(),
            controller=controller.init_controller(params, axis_name, law),
            ledger=ledger.init_ledger(log_size),
        )

    def update_fn(updates, state, params=None, *, value=None, loss=None, **extra_args):
        value = _one_loss(value, loss)
        has_loss, has_params = value is not None, params is not None
        if has_loss:
            extra_args["value"] = value
        if loss is not None:
            extra_args["loss"] = loss
        _check_state(state)
        _check_real("update: updates", updates)
        step, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        _check_shapes(updates, step)
        _check_memory(mode, step, state.last_step)
        _check_structure(state.inner_state, inner_state)

        # Sense.
        telemetry = sensing.measure(
            gradients=updates,
            step=step,
            params=params,
            loss=value,
            last_step=state.last_step,
            sampled_gradients=memory.pick(updates, state.last_step),
            sampled_step=memory.pick(step, state.last_step),
            last_length=state.controller.last_length,
            inner_states=(state.inner_state, inner_state),
            axis_name=axis_name,
        )
        moved = state.controller.last_length > 0
        last_scale = state.controller.step_scale
        signals = statistics.compare(state.statistics, telemetry, last_scale, has_loss, law)

        # Interpret.
        bounds = envelope.step_bounds(state.controller, telemetry, signals, has_params, law, limits)
        pressure = telemetry.step_norm / bounds.healthy
        diagnosis = interpretation.diagnose(
            telemetry, signals, pressure, state.controller.too_long, moved, can_undo, law
        )
        regime, dwell, stressed = interpretation.next_regime(
            state.regime, state.dwell, state.stressed, diagnosis, last_scale, law
        )

        # Decide.
        command, steered = policy.decide(
            state.controller,
            regime,
            diagnosis,
            telemetry,
            signals,
            bounds,
            can_undo,
            law,
            limits,
        )

        # Act.
        emitted = actuation.emit(command, step, state.last_step if can_undo else None)
        taken = (command.action != Action.HOLD) & (command.action != Action.BACKTRACK)
        applied = memory.pick(emitted, state.last_step)
        last_step = actuation.keep_step(command, taken & ~diagnosis.empty, applied, state.last_step)
        inner_state = actuation.keep_inner_state(command, state.inner_state, inner_state)

        # Learn and log.
        nonfinite = interpretation.is_nonfinite(diagnosis.alarm)
        observed = statistics.observe(
            state.statistics, telemetry, signals, last_scale, moved, state.stressed, has_loss, law
        )
        spike = diagnosis.alarm == Cause.GRADIENT_SPIKE
        first = state.controller.rejections == 0
        absorbed = statistics.learn_spike(state.statistics, telemetry.gradient_norm, first, law)
        # Without data is a batch also where a step of earlier micro-batches ends with it. Learned,
        # such batches would wear every yardstick away.
        seen = taken & ~nonfinite & sensing.has_data(telemetry)
        learned = jax.tree.map(
            lambda old, new, held: jnp.where(seen, new, jnp.where(spike, held, old)),
            state.statistics,
            observed,
            absorbed,
        )
        return emitted, GuardState(
            inner_state=inner_state,
            last_step=last_step,
            regime=regime,
            dwell=dwell,
            stressed=stressed,
            has_loss=jnp.full([], has_loss, bool),
            has_params=jnp.full([], has_params, bool),
            statistics=learned,
            controller=steered,
            ledger=ledger.record(
                state.ledger, command, state.regime, regime, diagnosis.size, nonfinite
            ),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _one_loss(value, loss):
    if value is not None and loss is not None:
        raise ValueError("update: give the loss once, as value= or as loss=, got both")
    for name, given in (("value", value), ("loss", loss)):
        if given is None:
            continue
        try:
            # By its type: text would be taken for the name of a dtype.
            dtype = jnp.result_type(given if hasattr(given, "dtype") else type(given))
        except TypeError as error:
            raise ValueError(f"update: {name} must be a real scalar, got {given!r}") from error
        shape = jnp.shape(given)
        if shape != ():
            raise ValueError(f"update: {name} must be a scalar, got shape {shape}")
        if not any(jnp.issubdtype(dtype, x) for x in (jnp.floating, jnp.integer, jnp.bool_)):
            raise ValueError(f"update: {name} must be real, got dtype {dtype}")
    return loss if value is None else value


def _check_real(name, tree):
    dtypes = [getattr(x, "dtype", type(x)) for x in jax.tree.leaves(tree)]
    if any(jnp.issubdtype(d, jnp.complexfloating) for d in dtypes):
        raise ValueError(
            f"{name} must be real, got complex leaves; put the guard inside "
            "optax.contrib.split_real_and_imaginary, whose update takes no value="
        )


def _check_state(state):
    if not hasattr(state, "controller"):
        raise ValueError(
            f"update: state must be what init made, got a {type(state).__name__}; a plain "
            "optimizer's is adopted with tx.init(params)._replace(inner_state=state)"
        )


def _check_shapes(updates, step):
    given, made = (len(jax.tree.leaves(tree)) for tree in (updates, step))
    if given != made:
        raise ValueError(
            f"update: updates must have the arrays of the step, got {given} for a step of {made}"
        )
    found = jax.tree_util.tree_leaves_with_path(updates)
    for (path, gradient), emitted in zip(found, jax.tree.leaves(step), strict=True):
        if jnp.shape(gradient) != jnp.shape(emitted):
            name = jax.tree_util.keystr(path) or "the gradient"
            raise ValueError(
                f"update: updates must have the shapes of the step, got {jnp.shape(gradient)} for "
                f"{name}, whose step has {jnp.shape(emitted)}; what reduces gradients per example, "
                "such as differentially_private_aggregate, must stand before the guard"
            )


def _check_memory(mode, step, last_step):
    if not memory.fits(mode, last_step, step):
        raise ValueError(
            f"update: state must be of memory={mode!r}, got one of another mode or of arrays of "
            "other shapes than those of updates"
        )
    before, now = jax.tree.structure(last_step), jax.tree.structure(step)
    if mode != "none" and before != now:
        raise ValueError(
            f"update: updates must have the structure of the params of init, got {now} for {before}"
        )


def _check_structure(old, new):
    before, after = jax.tree.structure(old), jax.tree.structure(new)
    if before != after:
        raise ValueError(
            "update: the inner optimizer's state must keep its structure (a checkpoint is restored "
            f"into that of init), got {before} and then {after}"
        )


def _check(inner, mode, min_scale, relative_step_limit, max_rejections, log_size, axis_name, law):
    if not (callable(getattr(inner, "init", None)) and callable(getattr(inner, "update", None))):
        raise ValueError(f"guard: inner must be an optax transformation, got {inner!r}")
    if mode not in memory.MODES:
        raise ValueError(f"guard: memory must be one of {memory.MODES}, got {mode!r}")
    for name, number, low, high in (
        ("min_scale", min_scale, 1e-9, 1),
        ("relative_step_limit", relative_step_limit, 1e-6, 1e6),
    ):
        if not (is_number(number, numbers.Real) and low <= number <= high):
            raise ValueError(
                f"guard: {name} must be in [{low:g}, {high:g}], got {number!r}{_hint(number)}"
            )
    for name, count in (("max_rejections", max_rejections), ("log_size", log_size)):
        if not (is_number(count, numbers.Integral) and 1 <= count < 2**31):
            raise ValueError(
                f"guard: {name} must be an integer in [1, 2**31), got {count!r}{_hint(count)}"
            )
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if axis_name is not None and not all(isinstance(name, str) and name for name in names):
        raise ValueError(
            f"guard: axis_name must be a name of a mesh axis or a tuple of such, got {axis_name!r}"
        )
    if not isinstance(law, Law):
        raise ValueError(f"guard: law must be a lbw_optax.Law, got {law!r}")


def _hint(x: Any) -> str:
    if not isinstance(x, jax.Array):
        return ""
    return " (an array: inject_hyperparams must not inject it, name it in static_args)"
