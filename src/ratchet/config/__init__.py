"""The configuration: a fact is written once, and every program receives the whole tree.

Each leaf carries a mark that says what may happen to it on resume:
`Free` may change silently, `Announced` is printed and recorded, `Fixed` is refused.
"""

from ratchet.config.inference import InferenceConfig, VllmConfig, WeightsConfig
from ratchet.config.launching import (
    LaunchConfig,
    LogConfig,
    ReportConfig,
    SlurmConfig,
    SlurmRoleConfig,
    TrackerConfig,
)
from ratchet.config.marks import Announced, Fixed, Free, OnResume, Positive
from ratchet.config.model import CkptConfig, LoraConfig, ModelConfig
from ratchet.config.orchestrator import (
    LOWEST_TEMPERATURE,
    ClientConfig,
    EnvConfig,
    EvalConfig,
    OrchestratorConfig,
    SamplingConfig,
    is_temperature,
)
from ratchet.config.roots import RLConfig, RunConfig, ServerConfig, SFTConfig
from ratchet.config.trainer import (
    DataConfig,
    LossConfig,
    OptimConfig,
    ParallelConfig,
    RLTrainerConfig,
    SchedulerConfig,
    TrainerConfig,
)

__all__ = [
    "LOWEST_TEMPERATURE",
    "Announced",
    "CkptConfig",
    "ClientConfig",
    "DataConfig",
    "EnvConfig",
    "EvalConfig",
    "Fixed",
    "Free",
    "InferenceConfig",
    "LaunchConfig",
    "LogConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "OnResume",
    "OptimConfig",
    "OrchestratorConfig",
    "ParallelConfig",
    "Positive",
    "RLConfig",
    "RLTrainerConfig",
    "ReportConfig",
    "RunConfig",
    "SFTConfig",
    "SamplingConfig",
    "SchedulerConfig",
    "ServerConfig",
    "SlurmConfig",
    "SlurmRoleConfig",
    "TrackerConfig",
    "TrainerConfig",
    "VllmConfig",
    "WeightsConfig",
    "is_temperature",
]
