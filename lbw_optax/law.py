"""The constants of the control law: one home, each with its unit and its origin."""

import dataclasses
import math
import numbers
from typing import Any

_SHARES = (
    "trust_way",
    "loss_decay",
    "trend_decay",
    "past_age",
    "noise_decay",
    "overshoot_decay",
    "edge_share",
    "gradient_rise",
    "gradient_fall",
    "spike_share",
    "share_least",
    "persistence",
    "calm_ratio",
    "slack",
    "cut",
    "cut_limit",
)

_LEAST, _LARGEST_SHARE, _LARGEST = 2.0**-126, 1 - 2.0**-24, (2 - 2.0**-23) * 2.0**127
"""The least number above 0 that float32 holds in full, the largest below 1, and the largest."""

_FACTORS = (
    "growth",
    "release",
    "rise_limit",
    "allowance_most",
    "share_most",
    "trust_growth",
    "collapse_ratio",
    "spike_ratio",
    "spike_most",
)

_THRESHOLDS = (
    "relative_step",
    "relative_step_start",
    "stress_noise",
    "backtrack_noise",
    "gain_noise",
    "gain_slopes",
    "jump_noise",
    "jump_overshoot",
    "collapse_ratio",
    "spike_ratio",
    "stress_pressure",
    "brief_pressure",
)
"""What may be infinite."""

_ORDERED = (
    ("cut_limit", "cut"),
    ("earned_least", "earned_most"),
)
"""The two ends of a range."""


def is_number(x: Any, kind: type) -> bool:
    """Returns whether `x` is a number of a kind of `numbers`; a truth value is none."""
    return isinstance(x, kind) and not isinstance(x, bool)


@dataclasses.dataclass(frozen=True)
class Law:
    """What the sensors call unusual and how the policy answers.

    The defaults are one set for every task, chosen in the study of `docs/benchmarks.md`; few runs
    have a reason to change them. An infinite threshold switches its sensor off, which is how the
    ablations of the study are made. Ratios and scales are dimensionless, decays are per step.
    """

    # Envelope: how long a healthy step is.
    relative_step: float = 0.01
    """Longest healthy step over the parameters' norm, in the long run. AdamW's best learning rate
    takes 0.5 to 1 % there on small decoders, with LoRA or without."""
    relative_step_start: float = 0.03
    """The same for the first step, where Adam's step is a sign: later ones are about 4 times
    shorter because its first moment averages the noise away."""
    relative_step_power: float = 0.2
    """The first value falls with this power of the step, a little slower than AdamW's own steps do
    at its best learning rate (0.3), so that such a run is rarely caught with LoRA."""
    unset_size: float = 1e-3
    """Parameters whose root mean square is below this have no size of their own yet: a relative
    step says nothing about them."""
    allowance_most: float = 4.0
    """Largest factor on the parameters' norm for those that start at zero. LoRA has about 2; a
    softmax regression from zero with its bias at the class prior would have 33, no envelope at all,
    and ends .03 above its best with this limit where it ended .2 to 2.1 above."""
    trust_way: float = 0.12
    """Part of the way to the minimum of its own parabola that the absolute trust radius lets a step
    go. At 0.1 cocob needs twice its steps on a parabola; from 0.15 on networks feel the radius."""
    trust_growth: float = 2.0
    """Largest factor per step of that radius, up and down, as in trust-region methods (Conn, Gould
    and Toint, 2000)."""

    # Sensing: running statistics.
    loss_decay: float = 0.9
    """Decay of the mean loss (about the last 10 steps)."""
    trend_decay: float = 0.98
    """Decay of a second, slower mean (about the last 50 steps)."""
    past_age: float = 0.25
    """Age of a third mean of the loss, as a share of the run so far. At 0.5 fine-tunes end .003 to
    .02 worse, at 0.14 training from scratch .02 and more (each with the best `mixing_steps`)."""
    gain_noise: float = 0.35
    """Distance of the two means of the loss, in its standard deviations, that is certain progress:
    twice the standard error of that distance. Without it, at a `stress_noise` of 0.1, a contrastive
    model with warmup and cosine at its best learning rate was annealed while its loss still fell:
    .178 instead of .039. A slower mean that is so much above the lowest that it was has risen."""
    gain_slopes: float = 2.0
    """The same distance, in mean slopes at the scale in force, above which steps are productive and
    not annealed. From about step 150 on the two means are 40 steps apart, so this is a twentieth of
    what the steps promise. Where less is kept they are mostly noise, and shorter ones gain more.
    Without it a pretrained model of 260,000 parameters ended .07 nats above its best, with it .02;
    at 4 no lower, but SGD with momentum .04 higher."""
    noise_decay: float = 0.98
    """Decay of the variance of the loss around the first mean (about the last 50 steps)."""
    noise_clip: float = 3.0
    """Innovations enter the variance clipped at this many standard deviations."""
    loss_clip: float = 1e3
    """A loss alone so many standard deviations from its mean enters it clipped: the inverse of
    `noise_floor`, so that a positive loss may fall to 0 at once. Without it a single loss of 1e6
    blinded every test of the loss for 600 steps."""
    noise_floor: float = 1e-3
    """Least noise of the loss, as a share of it: keeps a loss without noise from alarming."""
    noise_floor_start: float = 0.05
    """The same for the first `noise_warmup` observations, when the noise is hardly known."""
    noise_warmup: int = 10
    """Observations before the noise estimate stands on its own."""
    blind_noise: float = 2.0
    """Without a loss the mean predicted change of it, times this, is the yardstick."""
    overshoot_decay: float = 0.95
    """Decay of the mean and variance of the overshoot."""
    edge_share: float = 0.3
    """Mean overshoot, as a share of the mean slope, from which on it is the curvature's and not the
    noise's: the edge of stability. Beyond its error it is .3 to .7 in small networks on data
    without much noise at their best learning rate, and in decoders at most .05, and .14 at ten
    times that rate. At .2 a noisy sine with SGD and momentum ended at ten times its best rate twice
    as high as at .3, at .4 the same sine with Adam a third higher at a third of its best rate."""
    edge_noise: float = 1.0
    """Mean overshoot, in standard deviations of the loss, above which the edge is no excuse: what
    steps gain there is lost again in going from side to side. Where steps that do not add up might
    go 3.5 times as far a student with Lion at ten times its best rate ended at 5.8 times the loss
    of its best, and ends at 1.2."""
    gradient_rise: float = 0.1
    """Weight of a gradient norm above its mean: a permanent shift of x50 is accepted in 14
    steps."""
    gradient_fall: float = 0.02
    """Weight of a gradient norm below its mean, so that quiet batches do not make a normal one
    look like a spike; the first ones count more, as in a plain average."""
    gradient_warmup: int = 5
    """Observations until the gradient-norm tests have full sensitivity; it grows linearly."""

    # Interpretation: when to suspect, when to raise an alarm, when to be calm.
    stress_noise: float = 0.2
    """Mean overshoot, in standard deviations of the loss, that counts as stress. It stays below
    0.05 in small decoders that end well; at 0.1 two tasks learned by turns at their best learning
    rate ended at .0145, at 0.2 at .0083 (without a guard .013). With an envelope four times too
    wide, LoRA at 3 times its best rate ends .007 worse at 0.2 than at 0.1, and .009 at 0.4."""
    backtrack_noise: float = 3.0
    """Overshoot of one step, in standard deviations of the loss, that undoes the step. In runs
    that collapse it reaches 1 to 40 within three steps. At 1 runs whose loss falls by orders of
    magnitude were undone again and again: two tasks by chance ended at .0070, at 3 at .0050."""
    jump_noise: float = 5.0
    """Loss innovation, in standard deviations, that undoes the step if overshoot or gradients
    agree."""
    jump_overshoot: float = 0.5
    """Overshoot, in standard deviations of the loss, that agrees with a loss jump. At 0.1 a single
    hard batch undid a healthy step in 2 of 8 runs of 1,000 steps."""
    collapse_ratio: float = 3.0
    """Two-sided test: the gradient norm fell by this factor while the loss jumped."""
    spike_ratio: float = 10.0
    """Gradient spike: gradient norm over its running mean. Healthy first steps stay below 5."""
    spike_rise: float = 0.3
    """What a spike that was held, or the first of several in a row, adds to the log of that ratio:
    of spikes that recur at 100 times the mean seven to fourteen are held. At 0.1 a classifier of
    single samples, 1 % of them positive, had not learned them in 6,000 steps (loss .070, at 0.3
    .014, without a guard .012)."""
    spike_share: float = 1e-3
    """Share of the steps that is held for spikes in the long run, however often they recur."""
    spike_most: float = 100.0
    """Largest factor on that ratio: a norm beyond both is a fault, however often it recurs."""
    stress_pressure: float = 1.2
    """Pressure, the length of a step over the healthy length, that is suspected if it lasts. From
    scratch the first 14 steps of runs at half of their best learning rate are at 1.0 to 1.17."""
    brief_pressure: float = 2.0
    """Pressure that is suspected at once."""
    brief_steps: int = 2
    """Steps in a row that may have a pressure between the two before it counts as stress: at small
    batches healthy runs have single ones."""
    calm_ratio: float = 0.25
    """Hysteresis: STRESS ends below this share of the healthy length. At 0.5 a full fine-tune at 2
    to 3 times its best learning rate was let go too early, and ended .06 nats worse."""
    calm_steps: int = 50
    """Dwell: calm steps in a row before STRESS becomes RECOVERY."""
    recovery_steps: int = 20
    """Dwell: steps without an alarm before RECOVERY becomes STABLE."""

    # Policy: how the scale moves.
    share_size: float = 15_625.0
    """Number of parameters up to which the latch leaves a step under stress all of the healthy
    length; in larger networks a share of it that falls with the fourth root of their number, .5 at
    250 thousand. A start below the best learning rate, from which the earned factor can grow, is a
    warm-up. With .7 for all, decoders from scratch of 200 to 860 thousand parameters end .02 to
    .07 above AdamW's best, and one of 20 thousand .02 higher than now."""
    share_least: float = 0.2
    """Least such share, that of 10 million parameters. From scratch .5 is too much for 862
    thousand and 4.4 million, which end .03 and .02 above AdamW's best; nothing larger was
    measured."""
    share_elasticity: float = 1.25
    """Elasticity of the loss, the share of it by which the first step leads down for each share of
    the parameters' norm that it takes, at which that share is 1; else it goes with the inverse
    square root, where that is more than what the size gives. It is .4 to 3.4 in decoders over 4,096
    words, of width 32 to 128, .9 to 1.3 in LoRA, and 1.3 to 33 in decoders over bytes of 20
    thousand to 4.4 million parameters. Without it one over 4,096 words ends .14 above AdamW's best,
    and one of 20 thousand with all matrices at .02 ends .02 higher."""
    share_most: float = 2.0
    """Largest such share. Decoders over 4,096 words reach it at a width of 32, or come near. A
    recommender from normal(0.01), with an elasticity of .001, ends at ten times its best rate at
    .25 with it and with 4, and with 8 at .20."""
    share_kurtosis: float = 2.5
    """Kurtosis of a step up to which it may have all of the healthy length after a warm-up; above,
    its share goes with the inverse, where that is more than size and elasticity give. Adam's steps
    have 3 to 4 with a `b2` of .95, 5 to 15 with .999. A GPT of 216 thousand parameters ends at half
    of its best peak at 2.08 without it, 2.06 with 2 and 2.05 with 2.5 and 3, a full fine-tune at
    1.650, 1.653, 1.657 and 1.659."""
    slack: float = 0.25
    """Least part of what a step may have that the latch leaves. Adam shortens its own steps by
    4.4 = sqrt((1 + b1) / (1 - b1)) for b1 = 0.9; a step below it means that the stress is over. At
    0.5 decoders over 4,096 words and one of 197 thousand parameters end .08 and .05 higher."""
    growth: float = 1.02
    """Factor per step by which the earned factor rises while steps are significantly too short,
    and falls while they overshoot by more than the progress is worth and are not productive, see
    `gain_slopes`. More than 0.4 (1 - overshoot_decay) from 1 it outruns its own evidence."""
    earn_straight: float = 0.25
    """Steps are too short while the mean slope at their end is more than this share of the slope
    at their start."""
    earned_most: float = 2.0
    """Upper limit of the earned factor. From .7 of the healthy length training from scratch ends
    .03 to .08 nats worse at 1; from nearly all of it neither better nor worse, and at 4 up to .010
    better."""
    earned_least: float = 0.1
    """Lower limit of the earned factor."""
    mixing_steps: float = 30.0
    """Steps for which an overshoot lifts the loss: a mean overshoot is bearable while so many are
    less than what the run has gained since `past_age`. At 20 runs of 1,000 steps from scratch end
    .017 above AdamW's best, at 80 those of 3,000 end .06 above it."""
    bearable_least: float = 0.001
    """Least bearable overshoot, in standard deviations of the loss. At a third of it LoRA ends .003
    better after 300 and 1,000 steps, but .004 to .006 worse after 3,000; at 5 times it up to .011
    worse."""
    bearable_blind: float = 0.05
    """Bearable overshoot without a loss, in units of the yardstick that stands for its noise; in
    standard deviations of the loss runs at the best learning rate of training from scratch reach
    0.045."""
    persistence: float = 0.85
    """Mean cosine of successive steps at which the two values, the healthy length, `stress_noise`
    and `gain_slopes` hold. AdamW's is about 0.9, Lion's 0.5, Adafactor's near 0: steps that do not
    add up may be longer."""
    release: float = 1.05
    """Factor per step by which the scale returns to 1 in RECOVERY."""
    rise_limit: float = 1.25
    """Rate limit: factor per step by which the scale may rise for whatever reason."""
    cut_noise: float = 0.1
    """Overshoot, in standard deviations of the loss, that what a backtrack leaves would have had.
    At 0.05 a full fine-tune ends .003 better, but Lion .005 worse, and adam and adamw on Rosenbrock
    take a tenth longer; at 0.2 the fine-tune ends .002 worse."""
    cut: float = 0.5
    """Largest share of the last step that a backtrack leaves."""
    cut_limit: float = 0.1
    """Smallest share of the last step that a backtrack leaves; below this scale, on the way back to
    1, nothing is learned of a step and the one before it."""
    repeat_backtracks: int = 4
    """Rejected observations in a row, after the first, that shorten the last step, by half each:
    four leave a sixteenth of it."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            # NaN is not at least anything.
            if not (is_number(value, numbers.Real) and value >= _LEAST):
                raise ValueError(f"Law.{name} must be a number above 0 in float32, got {value!r}")
            if _LARGEST < value < math.inf:
                raise ValueError(f"Law.{name} must be at most {_LARGEST:g}, got {value!r}")
            if field.type is int and not is_number(value, numbers.Integral):
                raise ValueError(f"Law.{name} must be a whole number, got {value!r}")
            if math.isinf(value) and name not in _THRESHOLDS:
                raise ValueError(f"Law.{name} must be finite, got {value!r}")
            # Python's own numbers: numpy's would decide the dtypes of the state.
            whole = isinstance(value, numbers.Integral)
            if whole and value >= 2**31:
                raise ValueError(f"Law.{name} must be below 2**31, got {value!r}")
            object.__setattr__(self, name, int(value) if whole else float(value))
        for name in _FACTORS:
            if getattr(self, name) < 1:
                raise ValueError(f"Law.{name} must be at least 1, got {getattr(self, name)!r}")
        for name in _SHARES:
            if getattr(self, name) > _LARGEST_SHARE:
                raise ValueError(
                    f"Law.{name} must be in (0, 1), and below 1 in float32, "
                    f"got {getattr(self, name)!r}"
                )
        for least, most in _ORDERED:
            if getattr(self, least) > getattr(self, most):
                raise ValueError(
                    f"Law.{least} must be at most {most} = {getattr(self, most)!r}, "
                    f"got {getattr(self, least)!r}"
                )
