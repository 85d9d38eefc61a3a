"""IGBv2: improvable gap balancing by reinforcement learning (Dai, Fei and Lu, UAI 2023, arXiv:2307.15429)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import BaseOptions, LossWeighting, Vector
from polytask.balancing.epoch_mean import EpochMean
from polytask.balancing.rows import rows_of
from polytask.balancing.soft_actor_critic import SoftActorCritic
from polytask.errors import InputError
from polytask.registry import register


@register(
    "igb_v2",
    family="balancing",
    paper="arXiv:2307.15429",
    needs="losses",
    aliases=("improvable_gap_balancing_v2",),
    invariances=("scale",),
    exempt={
        "permutation": "networks and weights are drawn by position: equivariant in distribution only (test_igb_v2.py)"
    },
    example={"base_epoch": 0, "after": 1, "start": 2, "interval": 2, "batch": 8, "hidden": (6, 6), "memory": 64},
)
class IGBv2(LossWeighting):
    r"""Let an agent learn the weights under which the task that improves least improves most, on logarithms of the losses.

    .. math:: L = \sum_i w_i \log L_i, \qquad w = p \circ a_t, \quad a_t \sim \pi(\cdot \,|\, s_t), \quad
        s_t = L_t / \bar L, \qquad r_t = \min_i \frac{L_{t,i} - L_{t+1,i}}{\bar L_i}

    with :math:`\bar L` the mean losses of the epoch of index ``base_epoch``, and weights a of mean 1 that soft actor-critic
    (:class:`~polytask.balancing.soft_actor_critic.SoftActorCritic`) learns from the transitions it remembers. Up to the epoch
    ``start`` weights are drawn at random, as in RLW. Needs ``begin_epoch()`` at the start of every epoch, as the built-in loop does.

    Formula, networks and defaults are those of the authors' code, but for three things: the agent sees the losses measured by
    :math:`\bar L`, which makes the method blind to the scale of all losses, where the code shows them as they are; the code
    multiplies rewards by the first learning rate over the present one, which a balancer does not see; and the preference is ours. A
    task that a batch lacks is shown as it was last seen, and neither counts for the reward nor takes a share of the weights.

    Args:
        base_epoch: the epoch that the losses are measured by.
        after: the epoch from which on the agent learns.
        start: the epoch from which on the agent decides.
        interval: steps from one round of lessons to the next; a round has half as many lessons as this, and as many once memory is full.
        batch: transitions in each lesson once memory is full; half as many at first.
        lr: step size of the agent.
        discount: :math:`\gamma`, what the reward of the next step counts in this one's.
        hidden: widths of the hidden layers of the agent's networks.
        memory: how many transitions the agent remembers.

    Cost: one transfer of K numbers to the host a step, and there half a lesson to one on average (with these defaults 0.1 to 0.2
    billion operations each), whatever the size of the model. Losses must be positive.
    """

    takes_logarithms = True

    def __init__(
        self,
        *,
        base_epoch: int = 1,
        after: int = 3,
        start: int = 5,
        interval: int = 50,
        batch: int = 256,
        lr: float = 3e-4,
        discount: float = 0.99,
        hidden: Sequence[int] = (128, 128),
        memory: int = 10_000,
        **base: Unpack[BaseOptions],
    ) -> None:
        super().__init__(**base)
        if not (
            min(base_epoch, after, start) >= 0 and min(interval, batch, memory) >= 2 and lr > 0 and 0 <= discount < 1
        ):
            raise InputError(
                "igb_v2 needs epochs of at least 0, an interval, batch and memory of at least 2, lr > 0 and a discount in [0, 1)"
            )
        self.base_epoch, self.after, self.start, self.interval = base_epoch, after, start, interval
        self.batch, self.lr, self.discount, self.hidden, self.memory = batch, lr, discount, tuple(hidden), memory
        self.running = EpochMean()

    def agent(self, n_tasks: int) -> SoftActorCritic:
        """Who decides for so many tasks."""
        return SoftActorCritic(n_tasks, self.hidden, self.lr, self.discount, memory=self.memory)

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        return {
            **self.running.start(n_tasks),
            "base": torch.full((n_tasks,), torch.nan, dtype=torch.float32),
            # s and a of the step before, and the number of the step that saw each task last
            "seen": np.ones(n_tasks),
            "played": np.ones(n_tasks),
            "last": np.full(n_tasks, -1),
            "steps": 0,
            "agent": self.agent(n_tasks).start(self.rng),
        }

    def begin_epoch(self) -> None:
        mean = self.running.end(self.state)
        if mean is not None and self.state["epoch"] - 1 == self.base_epoch:
            self.state["base"] = mean.cpu()
            self.state["last"][:] = -1  # what was seen before was not measured

    def combine(self, losses: Float[Tensor, " tasks"]) -> tuple[Tensor, Tensor]:
        state = self.state
        self.running.add(state, rows_of(self.active, len(state["last"]), losses.device), losses)
        positive = losses.clamp_min(torch.finfo(losses.dtype).tiny)
        agent = self.agent(len(state["last"]))
        self._observe(agent, positive.detach().double().cpu().numpy())
        if state["epoch"] >= self.after and state["steps"] % self.interval == 0 and state["agent"]["remembered"]:
            fullness = (1 + min(1.0, state["agent"]["remembered"] / self.memory)) / 2
            for _ in range(int(self.interval * fullness)):
                agent.learn(state["agent"], int(self.batch * fullness), self.rng)
        if state["epoch"] < self.start:
            z = np.exp(self.rng.standard_normal(len(state["last"])))
            a = len(z) * z / z.sum()
        else:
            a = agent.act(state["agent"], state["seen"], self.rng)
        state["played"][self.active] = a[self.active]
        state["steps"] += 1
        share = a[self.active] / a[self.active].mean()
        w = torch.as_tensor(self.p * share).to(losses)
        return (w * positive.log()).sum(), w / positive.detach()

    def _observe(self, agent: SoftActorCritic, values: Vector) -> None:
        """Measure the losses, and let the agent remember what its last weights led to."""
        state = self.state
        base = state["base"].double().numpy()[self.active]
        known = ~np.isnan(base)
        before = state["seen"].copy()
        state["seen"][self.active] = np.where(known, values / np.where(known, base, 1.0), 1.0)
        compared = self.active[known & (state["last"][self.active] == state["steps"] - 1)]
        if len(compared) and state["steps"]:
            reward = float((before - state["seen"])[compared].min())
            agent.remember(state["agent"], before, state["played"], state["seen"], reward)
        state["last"][self.active] = state["steps"]
