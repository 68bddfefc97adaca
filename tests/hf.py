"""What tests of exported and imported models share: model folders of random weights, and comparisons with transformers.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_scale.checkpoint.reader import load_model, persistent_buffers
from moe_scale.config import DecoderConfig, LMConfig, MoEConfig, TextDataConfig
from moe_scale.models.decoder import DecoderLM
from moe_scale.train.model_folder import write_model_folder

TOLERANCE = 1e-4
MODEL = {"vocab_size": 260, "num_layers": 2, "d_model": 24, "num_heads": 4, "num_kv_heads": 2, "rope_theta": 500.0}
MOE = {"num_experts": 5, "top_k": 2, "intermediate_size": 12}


def randomized(model: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """The model with norms that are not all ones and biases that are not zero, which would hide what is misplaced."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
        for name, bias in model.named_buffers():
            if name.endswith(("selection_bias_E", "e_score_correction_bias")):
                bias.copy_(0.1 * torch.randn(bias.shape, generator=generator))
    return model


def model_folder(folder: Path, model: dict[str, Any], moe: dict[str, Any]) -> Path:
    """A decoder of random weights."""
    config = LMConfig(
        model=DecoderConfig(**(MODEL | model)),
        moe=MoEConfig(**(MOE | moe)),
        data=TextDataConfig(tokenizer="bytes", seq_len=96),
    )
    made = randomized(DecoderLM(config.model, config.moe, seed=3))
    state = dict(made.named_parameters()) | persistent_buffers(made)
    return write_model_folder(folder, "decoder", config, state.__getitem__, origin={})


def ours(path: Path) -> DecoderLM:
    found = load_model(path, dropless=True)
    assert isinstance(found, DecoderLM)
    return found


def theirs(path: Path) -> PreTrainedModel:
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, local_files_only=True).eval()
    return found


@torch.no_grad()
def assert_same_model(our: DecoderLM, their: PreTrainedModel, new_tokens: int = 8) -> None:
    """Logits to 1e-4, and greedy tokens."""
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(our.config.vocab_size, (2, 11), generator=generator)
    torch.testing.assert_close(our(ids_BS), their(input_ids=ids_BS).logits, rtol=TOLERANCE, atol=TOLERANCE)
    their.generation_config.eos_token_id = None
    limits: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False}
    written = their.generate(ids_BS, attention_mask=torch.ones_like(ids_BS), **limits)
    assert torch.equal(greedy(our, ids_BS, new_tokens), written[:, ids_BS.shape[1] :])


@torch.no_grad()
def greedy(model: DecoderLM, ids_BS: Tensor, new_tokens: int) -> Tensor:
    """The most probable continuation, with kept keys and values."""
    logits_BV, state = model.start(ids_BS)
    found = [logits_BV.argmax(dim=-1)]
    while len(found) < new_tokens:
        logits_BV, state = model.step(found[-1], state)
        found.append(logits_BV.argmax(dim=-1))
    return torch.stack(found, dim=1)
