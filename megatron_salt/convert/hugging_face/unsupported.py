"""Architectures of transformers that cannot be imported, and what this decoder lacks for each. Pure."""

from __future__ import annotations

from collections.abc import Mapping

_EXPERTS = "mixture of experts"
_SCALED = "scaled embeddings, norms whose weights count from 1, and GELU in a gated MLP"
LACKING: Mapping[str, str] = {
    "MixtralForCausalLM": _EXPERTS,
    "Qwen2MoeForCausalLM": _EXPERTS,
    "Qwen3MoeForCausalLM": _EXPERTS,
    "OlmoeForCausalLM": _EXPERTS,
    "GptOssForCausalLM": _EXPERTS,
    "DeepseekV2ForCausalLM": f"latent attention and no {_EXPERTS}",
    "DeepseekV3ForCausalLM": f"latent attention and no {_EXPERTS}",
    "GemmaForCausalLM": _SCALED,
    "Gemma2ForCausalLM": f"{_SCALED}, norms after attention and MLP, and capped logits",
    "Gemma3ForCausalLM": f"{_SCALED}, norms after attention and MLP, and windows in some layers",
    "SmolLM3ForCausalLM": "layers without positions among layers with them (no_rope_layers)",
    "OlmoForCausalLM": "norms without weights",
    "Olmo2ForCausalLM": "norms after attention and MLP",
    "Olmo3ForCausalLM": "norms after attention and MLP",
    "GraniteForCausalLM": "multipliers of embedding, attention, residual and logits",
    "CohereForCausalLM": "norm that attention and MLP share, and no scale of logits",
    "Cohere2ForCausalLM": "norm that attention and MLP share, and no scale of logits",
    "PhiForCausalLM": "norm that attention and MLP share, and no bias of the output layer",
    "GPTJForCausalLM": "norm that attention and MLP share, and no bias of the output layer",
    "FalconForCausalLM": "norm that attention and MLP share",
    "BloomForCausalLM": "ALiBi positions",
    "MptForCausalLM": "ALiBi positions",
    "NemotronForCausalLM": "norms whose weights count from 1",
    "GlmForCausalLM": "rotary embeddings of neighbouring channels",
    "MambaForCausalLM": "state-space layers",
    "Mamba2ForCausalLM": "state-space layers",
}
"""What this decoder lacks for an architecture that people ask for; each would compute something else."""
