"""What a run is, as frozen dataclasses. Nothing here imports torch or touches a device.

Every field is a setting: on the command line (``--moe.top_k 2``), in a YAML file (``moe: {top_k: 2}``) and in
``--help``. Types and single-value ranges are in the annotations; what ties several values together is in
``problems()``, which reports everything at once so that a user mends a file in one go.
"""

from moe_scale.config.base import SCALES, Scale, divisors, duration_seconds, setting, show
from moe_scale.config.classifier import (
    ClassifierConfig,
    ClassifierEvalConfig,
    ClassifierModelConfig,
    ClassifierMoEConfig,
    ExampleDataConfig,
    complete_moe,
)
from moe_scale.config.image_text_data import ImageTextDataConfig
from moe_scale.config.language_model import DecoderConfig, LMConfig, LMEvalConfig, TextDataConfig
from moe_scale.config.lora import DecoderLoRAConfig, LoRAConfig
from moe_scale.config.moe import MoEConfig
from moe_scale.config.multimodal import (
    ImageEncoderConfig,
    MultimodalConfig,
    MultimodalEvalConfig,
    MultimodalModelConfig,
    StackConfig,
)
from moe_scale.config.run import (
    CheckpointConfig,
    EarlyStoppingConfig,
    EvalConfig,
    FaultConfig,
    OptimConfig,
    RunConfig,
    TelemetryConfig,
)
from moe_scale.config.switch import SwitchConfig, SwitchModelConfig, SwitchMoEConfig, SwitchTextDataConfig
from moe_scale.config.translation import PairDataConfig, Seq2SeqConfig, TranslationConfig, TranslationEvalConfig

__all__ = [
    "SCALES",
    "CheckpointConfig",
    "ClassifierConfig",
    "ClassifierEvalConfig",
    "ClassifierMoEConfig",
    "ClassifierModelConfig",
    "DecoderConfig",
    "DecoderLoRAConfig",
    "EarlyStoppingConfig",
    "EvalConfig",
    "ExampleDataConfig",
    "FaultConfig",
    "ImageEncoderConfig",
    "ImageTextDataConfig",
    "LMConfig",
    "LMEvalConfig",
    "LoRAConfig",
    "MoEConfig",
    "MultimodalConfig",
    "MultimodalEvalConfig",
    "MultimodalModelConfig",
    "OptimConfig",
    "PairDataConfig",
    "RunConfig",
    "Scale",
    "Seq2SeqConfig",
    "StackConfig",
    "SwitchConfig",
    "SwitchMoEConfig",
    "SwitchModelConfig",
    "SwitchTextDataConfig",
    "TelemetryConfig",
    "TextDataConfig",
    "TranslationConfig",
    "TranslationEvalConfig",
    "complete_moe",
    "divisors",
    "duration_seconds",
    "setting",
    "show",
]
