"""Ray: sessions, the sampler pool, the ranks of learner and critic, the actors of rewards. The only room that imports ray.

Algorithms see four verbs: `SamplerPool.generate`, `LearnerGroup.forward_backward`, `LearnerGroup.optim_step` and
`posttrain.weights.Publisher.publish`.

What may be lost, a sampler, is replaced (posttrain/fleet.py); what may not, a learner or this machine's Ray, ends the run with
RunInterrupted or its exit code, and --resume goes on.
"""

from posttrain.cluster.connection import session
from posttrain.cluster.gauges import StepGauges
from posttrain.cluster.ranks import CriticGroup, LearnerGroup
from posttrain.cluster.reward_actors import RewardActors
from posttrain.cluster.samplers import SamplerPool

__all__ = ["CriticGroup", "LearnerGroup", "RewardActors", "SamplerPool", "StepGauges", "session"]
