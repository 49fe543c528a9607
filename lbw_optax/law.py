"""The constants of the control law: one home, each with its unit and its origin."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Law:
    """What the sensors call unusual and how the policy answers.

    The defaults are one set for every task, chosen in the study of `docs/study.md`; a user has no
    reason to change them. An infinite threshold switches its sensor off, which is how the ablations
    of the study are made. Ratios and scales are dimensionless, decays are per step.
    """

    relative_step: float = 0.01
    """Envelope: longest healthy step over the parameters' norm. AdamW's best learning rate takes
    0.7-1 % on small decoders after the first steps, three times that rate is already harmful."""
    relative_step_start: float = 0.03
    """Envelope of the first step; falls with 1/sqrt(t) to `relative_step`. AdamW's first steps are
    3-4 times longer than its later ones because its second moment has just begun."""
    growth: float = 1.02
    """Factor per step by which the envelope widens while steps are provably too short, and narrows
    while they are provably too long. Above 0.4 (1 - overshoot_decay) it outruns its own evidence."""
    growth_limit: float = 10.0
    """How far the envelope can widen."""

    loss_fast: float = 0.1
    """Weight of a new loss in the fast mean (about the last 10 steps)."""
    loss_slow: float = 0.02
    """Weight of a new loss in the slow mean (about the last 50 steps); with the fast one it gives the
    progress per step."""
    noise_floor: float = 1e-3
    """Least noise of the loss, as a share of it: keeps a loss without noise from alarming."""
    noise_floor_start: float = 0.05
    """The same for the first `noise_warmup` observations, when the noise is hardly known."""
    noise_warmup: int = 10
    """Observations before the noise estimate stands on its own."""
    loss_clip: float = 3.0
    """Innovations enter the noise estimate clipped at this many standard deviations."""
    overshoot_decay: float = 0.95
    """Decay of the mean and variance of the overshoot."""
    gradient_rise: float = 0.1
    """Weight of a gradient norm above its mean: a permanent shift of x50 is accepted in 17 steps."""
    gradient_fall: float = 0.02
    """Weight of a gradient norm below its mean, so that quiet batches do not make a normal one look
    like a spike."""
    warmup: int = 5
    """Observations until the gradient-norm tests have full sensitivity; it grows linearly."""

    spike_ratio: float = 10.0
    """Gradient spike: gradient norm over its running mean. Healthy first steps stay below 5."""
    backtrack_noise: float = 1.0
    """Overshoot of one step, in standard deviations of the loss, that undoes the step. Runs that end
    well stay below 0.05 on average, runs that collapse reach 1 to 40 within three steps."""
    jump_noise: float = 5.0
    """Loss innovation, in standard deviations, that undoes the step if the overshoot agrees."""
    jump_overshoot: float = 0.1
    """Overshoot, in standard deviations of the loss, that agrees with a loss jump."""
    collapse_ratio: float = 3.0
    """Two-sided test: the gradient norm fell by this factor while the loss jumped."""
    stress_noise: float = 0.1
    """Mean overshoot, in standard deviations of the loss, that starts the annealing."""

    horizon: float = 5.0
    """Bounce that is worth its progress: the annealing holds the mean overshoot at `horizon` times
    the progress per step (remaining steps over mixing time)."""
    noise_share: float = 0.005
    """Floor of that threshold in standard deviations of the loss."""
    noise_share_limit: float = 0.05
    """Ceiling of that threshold in standard deviations of the loss."""

    caution: float = 1.0
    """Standard errors by which the mean overshoot is lowered before it counts."""
    blind_share: float = 0.1
    """Threshold of the annealing without a loss, in units of the predicted change per step."""
    cut: float = 0.5
    """Most that one step's annealing may take off the scale, and least that a backtrack does."""
    cut_limit: float = 0.1
    """Most that a backtrack takes off the last step."""
    release: float = 1.05
    """Factor per step by which the annealing lets the scale rise."""
    rise_limit: float = 1.25
    """Rate limit: factor per step by which the scale may rise for whatever reason."""
    ceiling_release: float = 1.01
    """Factor per step by which the ceiling that a backtrack leaves behind rises."""
    unset_size: float = 1e-3
    """Parameters whose root mean square is below this have no size of their own yet: a relative step
    says nothing about them."""
    trust_agreement: float = 0.5
    """A bound step was too short for certain if the slope at its end is more than this share of the
    slope at its start: along a parabola its minimum is then at least twice as far."""
    trust_growth: float = 2.0
    """Factor by which the absolute trust radius grows after such a step, and shrinks after one that
    overshot, as in trust-region methods (Conn, Gould and Toint, 2000)."""

    calm_steps: int = 50
    """Dwell: steps without suspicion before STRESS becomes RECOVERY."""
    recovery_steps: int = 20
    """Dwell: steps without an alarm before RECOVERY becomes STABLE."""
    calm_ratio: float = 0.5
    """Hysteresis: STRESS starts at the envelope and ends below this share of it."""

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, (int, float)) or math.isnan(value) or value <= 0:
                raise ValueError(f"Law.{name} must be a number above 0, got {value!r}")
        for name in ("loss_fast", "loss_slow", "overshoot_decay", "gradient_rise", "calm_ratio"):
            if getattr(self, name) >= 1:
                raise ValueError(f"Law.{name} must be in (0, 1), got {getattr(self, name)!r}")
