"""The optimizers that are compared, and how to read the guard's state.

A method is a function from the learning rate, a Python number or a traced scalar, to an optax
transformation. To compare another one, add it to `baselines`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from optax import contrib

import lbw_optax
from experiments import peers
from experiments.errors import UserError
from lbw_optax.memory import MODES

Method = Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]
"""From the learning rate to an optimizer."""

REGIMES = tuple(regime.name for regime in lbw_optax.Regime)
"""Names of the integers in `GuardState.regime`."""

LOG_SIZE = 1024
"""Events that the guard's log holds: more than the steps of a run, so that none is dropped."""

CLIP_NORM = 1.0
"""Largest gradient norm of the clipping baseline, the usual choice since GPT-3."""


def at_multiple(rate: float, multiple: float) -> float:
    """The product to nine digits: 3 * 3e-3 is 0.009 to a reader, and the same float32."""
    return float(f"{rate * multiple:.9g}")


def adamw(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """AdamW with optax's defaults."""
    return optax.adamw(learning_rate)


def clip() -> optax.GradientTransformation:
    """Clips the gradient to the global norm `CLIP_NORM`."""
    return optax.clip_by_global_norm(CLIP_NORM)


def adamw_clip(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """AdamW after clipping."""
    return optax.chain(clip(), adamw(learning_rate))


def guard(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """AdamW, guarded with the guard's defaults and a log that holds the whole run."""
    return lbw_optax.guard(adamw(learning_rate), log_size=LOG_SIZE)


def behind_guard(method: Callable[..., optax.GradientTransformation]) -> Method:
    """A method behind the guard with its defaults, as a user has it."""
    return lambda learning_rate: lbw_optax.guard(method(learning_rate))


ADAMW, GUARD = "AdamW", "guard(AdamW)"
"""The two names that verdicts are about."""

LOWER, USUAL = "AdamW, LR / 10", "AdamW + clip, warmup + cosine"
"""What a user tries first, and the usual recipe."""


def guards() -> dict[str, Method]:
    """AdamW, and AdamW behind the guard with each of its memories."""

    def behind(memory: str) -> Method:
        return lambda rate: lbw_optax.guard(adamw(rate), memory=memory, log_size=LOG_SIZE)

    return {ADAMW: adamw} | {f"{GUARD}, {mode}": behind(mode) for mode in MODES}


def skip(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Clipped AdamW that skips steps of outlying loss or gradient norm."""
    return peers.skip_step(adamw_clip(learning_rate))


def only_finite(method: Method) -> Method:
    """A method after clipping that skips up to five steps in a row that are not finite."""
    # Both branches of apply_if_finite must have one dtype, and a step that is skipped has the
    # gradients'; AdamW makes float32 of bfloat16.
    cast = optax.stateless(lambda u, p: jax.tree.map(lambda x, y: x.astype(y.dtype), u, p))

    def make(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        inner = optax.chain(clip(), method(learning_rate), cast)
        return optax.apply_if_finite(inner, max_consecutive_errors=5)

    return make


def momo_adam(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """MoMo-Adam that learns the loss to be reached: told that it is 0, it hardly ever brakes."""
    return peers.keep_dtypes(contrib.momo_adam(learning_rate, adapt_lower_bound=True))


def reduce_on_plateau(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """AdamW whose learning rate is halved when the mean loss of 10 steps twice fails to fall.

    optax's defaults, a tenth after 10 single steps, end far worse: a step's loss is mostly noise.
    """
    plateau = contrib.reduce_on_plateau(factor=0.5, patience=2, accumulation_size=10)
    return optax.chain(adamw(learning_rate), plateau)


def schedule_free(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Schedule-free AdamW; some of its state would turn float32 beside bfloat16 parameters."""
    return peers.keep_dtypes(contrib.schedule_free_adamw(learning_rate))


def stable_adamw(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """StableAdamW, with the tensors of each layer on their own."""
    return peers.per_layer(peers.stable_adamw(learning_rate))


RATE_FREE = {"Prodigy": contrib.prodigy, "D-Adapt AdamW": contrib.dadapt_adamw}
"""Methods that set their own learning rate: theirs is a multiplier, and their authors advise 1."""


def at_one(make: Method) -> Method:
    """A method with the multiplier 1, whatever the learning rate."""
    return lambda learning_rate: make(1.0)


def warmup_cosine(
    learning_rate: optax.ScalarOrSchedule, steps: int
) -> optax.GradientTransformation:
    """AdamW with the usual schedule: warmup over a tenth of the steps, then a cosine to a tenth."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps, end_value=0.1)
    return adamw(_shaped(learning_rate, shape))


def warmup_cosine_clip(
    learning_rate: optax.ScalarOrSchedule, steps: int
) -> optax.GradientTransformation:
    """The same after clipping: the usual recipe of language models."""
    return optax.chain(clip(), warmup_cosine(learning_rate, steps))


def lower(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """AdamW at a tenth of the learning rate: what a user tries first."""
    return adamw(_shaped(learning_rate, lambda step: 0.1))


@functools.cache  # Methods are told apart by identity: a new one would be compiled anew.
def baselines(steps: int) -> dict[str, Method]:
    """Every method that the suites compare.

    Args:
      steps: Length of the runs, for schedules.

    Returns:
      Name -> method; AdamW first, the guard last.
    """
    return {
        ADAMW: adamw,
        LOWER: lower,
        "AdamW, warmup + cosine": functools.partial(warmup_cosine, steps=steps),
        "AdamW + clip": adamw_clip,
        USUAL: functools.partial(warmup_cosine_clip, steps=steps),
        "ZClip": lambda learning_rate: optax.chain(peers.zclip(), adamw(learning_rate)),
        "skip-step": skip,
        "StableAdamW": stable_adamw,
        "reduce on plateau": reduce_on_plateau,
        "mechanize": lambda learning_rate: contrib.mechanize(adamw(learning_rate)),
        **{name: at_one(make) for name, make in RATE_FREE.items()},
        "schedule-free AdamW": schedule_free,
        "MoMo-Adam": momo_adam,
        GUARD: guard,
    }


def baselines_and(steps: int, more: Mapping[str, Method]) -> dict[str, Method]:
    """Every method that the suites compare, and those that one suite alone has.

    Args:
      steps: Length of the runs, for schedules.
      more: Name -> method, of those that the suite alone has.

    Returns:
      Name -> method; AdamW first, the guard last.
    """
    peers = dict(baselines(steps))
    guarded = peers.pop(GUARD)
    return {**peers, **more, GUARD: guarded}


def chosen(
    names: Sequence[str], default: Sequence[str], known: Mapping[str, Method]
) -> dict[str, Method]:
    """What a suite compares.

    Args:
      names: What the user asks for: some of `known`, or `all` for every one; empty for the suite's
        own choice.
      default: The suite's own choice.
      known: Name -> method, usually `baselines`.

    Returns:
      Name -> method.

    Raises:
      UserError: If a name is not known.
    """
    if tuple(names) == ("all",):
        return dict(known)
    for name in names:
        if name not in known:
            raise UserError(
                f"--methods {name!r}: unknown; give all alone, or some of "
                + ", ".join(map(repr, known))
            )
    return {name: known[name] for name in names or default}


def evaluated(opt_state: Any, params: Any) -> Any:
    """The parameters that are evaluated: schedule-free training has others than it steps with."""
    if optax.tree.get(opt_state, "z") is None:
        return params
    return contrib.schedule_free_eval_params(opt_state, params)


def _shaped(
    learning_rate: optax.ScalarOrSchedule, shape: Callable[[jax.Array], Any]
) -> optax.Schedule:
    """The product of a learning rate, or a schedule of it, and a schedule."""
    if callable(learning_rate):
        return lambda step: learning_rate(step) * shape(step)
    return lambda step: learning_rate * shape(step)


def pretraining(learning_rate: optax.ScalarOrSchedule, steps: int) -> optax.GradientTransformation:
    """The usual recipe for language models since GPT-3: warmup, cosine, clipping, weight decay.

    Args:
      learning_rate: Peak of the schedule, reached after a twentieth of the steps; it ends at a
        tenth of that.
      steps: Length of the schedule.

    Returns:
      The transformation.
    """
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 20, steps, end_value=0.1)
    return optax.chain(
        clip(),
        optax.adamw(lambda step: learning_rate * shape(step), b2=0.95, weight_decay=0.1),
    )


def guard_telemetry(opt_state: Any) -> tuple[jax.Array, jax.Array] | None:
    """The scale (float32) and the regime (int32, see `REGIMES`) of the last step.

    Args:
      opt_state: An optimizer state; works inside jit.

    Returns:
      Two scalars, or None for an optimizer without a guard.
    """
    state = optax.tree.get(opt_state, "GuardState")
    if state is None:
        return None
    return state.controller.step_scale, state.regime


def guard_record(opt_state: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the guard did in a run, for the results folder.

    Args:
      opt_state: An optimizer state.

    Returns:
      The scalar fields of the guard's report as `guard_...`, and its events, whose steps are
      counted from 1, as in the metrics; both are empty without a guard.
    """
    if guard_telemetry(opt_state) is None:
        return {}, []
    report = dataclasses.asdict(lbw_optax.report(opt_state))
    scalars = {
        f"guard_{field}": value
        for field, value in report.items()
        if isinstance(value, str | int | float)
    }
    events = [dataclasses.asdict(event) for event in lbw_optax.events(opt_state)]
    return scalars, [event | {"step": event["step"] + 1} for event in events]
