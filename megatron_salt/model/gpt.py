"""The decoder: megatron-core's embedding, rotary table and transformer block, and our output head.

The one place that speaks TransformerConfig. `GPT.forward` returns hidden states on every stage; on the last one `GPT.loss`
turns them into a loss. State-dict keys are those of megatron-core's GPTModel, so its checkpoints and ours interchange.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import megatron_salt.parallel.cpu as cpu  # before megatron
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import layers as tensor_parallel_layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, ModelType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_salt.config import ModelConfig, ParallelConfig
from megatron_salt.model.attention import CoreAttention
from megatron_salt.model.fp8 import ForwardContext, fp8_products
from megatron_salt.model.head import OutputHead
from megatron_salt.model.loss import SoftTarget
from megatron_salt.model.precision import TORCH, Precision
from megatron_salt.model.shapes import check_shapes
from megatron_salt.parallel.mesh import Mesh
from megatron_salt.parallel.versions import mlp_of_layer


def squared_relu(activations: Tensor) -> Tensor:
    """max(x, 0)^2. megatron-core's own is compiled when first called, which takes a C++ compiler and half a minute on a CPU."""
    return F.relu(activations).square()


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, precision: Precision = TORCH
) -> TransformerConfig:
    """megatron-core's configuration of one model at one layout. dtype: float32 or bfloat16, of parameters and activations."""
    interleaved = parallel.virtual_stages is not None
    fp8 = None if precision.forward_only else precision.fp8_format  # see precision.py
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_width,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_width,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        qk_layernorm=model.qk_layernorm,
        gated_linear_unit=model.swiglu,
        activation_func=F.silu if model.swiglu else squared_relu if model.squared_relu else F.gelu,
        add_bias_linear=not model.disable_bias_linear,
        init_method_std=model.init_method_std,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_stages,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        num_layers_in_first_pipeline_stage=parallel.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=parallel.decoder_last_pipeline_num_layers,
        account_for_embedding_in_pipeline_split=parallel.account_for_embedding_in_pipeline_split,
        account_for_loss_in_pipeline_split=parallel.account_for_loss_in_pipeline_split,
        recompute_granularity=parallel.recompute_granularity,
        recompute_method=parallel.recompute_method,
        recompute_num_layers=parallel.recompute_num_layers,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=tensor_parallel_layers._grad_accum_fusion_available,
        # One batch of point-to-point operations must not hold two between the same ranks, which interleaving makes.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        deallocate_pipeline_outputs=cpu.SENDS_COPY,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        fp8=fp8,
        fp8_recipe=precision.fp8_recipe,
        fp8_margin=precision.margin,
        fp8_amax_history_len=precision.amax_history_len,
        fp8_amax_compute_algo=precision.amax_compute_algo,
        fp8_param=precision.fp8_params,
        fp4=precision.fp4_format,
        fp4_recipe=precision.fp4_recipe,
        first_last_layers_bf16=any(precision.bf16_layers),
        num_layers_at_start_in_bf16=precision.bf16_layers[0],
        num_layers_at_end_in_bf16=precision.bf16_layers[1],
    )


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm that allows sequence parallelism: its weight is marked, so that its gradient is summed over tp."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm that allows sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def torch_block_spec(config: TransformerConfig, pp_rank: int, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers of one model chunk, of plain torch modules and megatron-core's parallel linears."""
    norm = RMSNorm if config.normalization == "RMSNorm" else LayerNorm
    qk_norm = norm if config.qk_layernorm else IdentityOp
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=CoreAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp_of_layer(MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)),
            mlp_bda=get_bias_dropout_add,
            # Transformer Engine keeps a norm inside the linear that follows it; with its keys, checkpoints interchange.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)


class GPT(LanguageModule):
    """One chunk of the decoder: the layers of one (virtual) pipeline stage, with embedding and head where they belong."""

    def __init__(
        self, config: TransformerConfig, model: ModelConfig, vocabulary: int, seq_length: int, chunk_tokens: int,
        groups: ProcessGroupCollection, pre_process: bool, post_process: bool, vp_stage: int | None, has_head: bool = True,
        precision: Precision = TORCH,
    ) -> None:  # fmt: skip
        """has_head: without one (a teacher's body) the last stage ends with the final norm, and a tied weight is the embedding alone.
        precision: the one that `config` was made with."""
        super().__init__(config=config, pg_collection=groups)
        self.precision = precision
        self.forward_context: ForwardContext = nullcontext
        if precision.forward_only and precision.fp8_format is not None:
            self.forward_context = fp8_products(precision, groups.tp)
        self.fp8_alone = False
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.has_head = has_head
        self.share_embeddings_and_output_weights = has_head and not model.untie_embeddings_and_output_weights
        self.model_type = ModelType.encoder_or_decoder  # 0.16's schedules read it
        self.mtp_process = False
        self.vocab_size = model.padded_vocabulary(vocabulary)
        self.max_sequence_length = model.max_position_embeddings or seq_length
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config, vocab_size=self.vocab_size, max_sequence_length=self.max_sequence_length,
                position_embedding_type=model.position_embedding_type, tp_group=groups.tp,
            ).to(config.params_dtype)  # fmt: skip  # learned positions are float32 whatever the config says
        self.rotary_pos_emb = None
        if model.position_embedding_type == "rope":
            self.rotary_pos_emb = RotaryEmbedding(
                kv_channels=model.head_width, rotary_percent=model.rotary_percent, rotary_base=model.rotary_base,
                use_cpu_initialization=config.use_cpu_initialization, cp_group=groups.cp,
            )  # fmt: skip
        self.decoder = TransformerBlock(
            config=config, spec=torch_block_spec(config, groups.pp.rank(), vp_stage), pre_process=pre_process,
            post_process=post_process, pg_collection=groups, vp_stage=vp_stage,
        )  # fmt: skip
        if post_process and has_head:
            self.output_layer = OutputHead(
                config.hidden_size, self.vocab_size, config=config, init_method=config.init_method,
                skip_weight_param_allocation=pre_process and self.share_embeddings_and_output_weights, tp_group=groups.tp,
                num_valid=vocabulary, chunk_tokens=chunk_tokens,
            )  # fmt: skip
        if has_head and (pre_process or post_process):
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, tensor: Tensor | list[Tensor]) -> None:
        """Called by the schedules with the hidden states of the stage before."""
        self.decoder.set_input_tensor(tensor[0] if isinstance(tensor, list) else tensor)

    def forward(self, tokens: Tensor, position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """tokens, position_ids: int64 [b, s/cp]; attention_mask: see attention.py -> hidden states [s/cp (/tp under sp), b, h]."""
        embedded = self.embedding(input_ids=tokens, position_ids=position_ids) if self.pre_process else None
        rotary = None
        if self.rotary_pos_emb is not None:
            length = self.rotary_pos_emb.get_rotary_seq_len(None, self.decoder, embedded, self.config, None)
            rotary = self.rotary_pos_emb(length)
        with self.forward_context():
            return self.decoder(hidden_states=embedded, attention_mask=attention_mask, rotary_pos_emb=rotary)

    def loss(self, hidden: Tensor, labels: Tensor, loss_mask: Tensor, teacher: SoftTarget | None = None) -> tuple[Tensor, Tensor]:
        """On the last stage: hidden states of `forward`, labels and loss_mask [b, s/cp] -> (summed loss, metric sums), see head.py."""
        return self.output_layer(hidden, labels, loss_mask, weight=self._tied_weight(), teacher=teacher)

    def logits(self, hidden: Tensor) -> Tensor:
        """On the last stage: logits [s/cp, b, padded vocabulary / tp] of hidden states, for generation and for oracles."""
        return self.output_layer(hidden, weight=self._tied_weight())[0]

    def _tied_weight(self) -> Tensor | None:
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The word embedding on the first stage, the head's copy of it on the last, None between. megatron-core asks."""
        if self.pre_process:
            return self.embedding.word_embeddings.weight
        return self.output_layer.weight if self.post_process else None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """megatron-core's sharded state dict, without the head's empty extra state, as GPTModel's."""
        if not self.has_head:  # LanguageModule's goes on to look for one
            return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        extra = state.pop(f"{prefix}output_layer._extra_state", None)
        assert not (extra and extra.data), "the output head has no extra state"
        return state


def build_model(
    model: ModelConfig, parallel: ParallelConfig, seq_length: int, vocabulary: int, dtype: torch.dtype, chunk_tokens: int, mesh: Mesh,
    precision: Precision = TORCH,
) -> list[GPT]:  # fmt: skip
    """This rank's model chunks on its device, one per virtual stage. Collective over the embedding group where weights are tied.

    vocabulary: real ids of the tokenizer; chunk_tokens: tokens whose logits exist at one time in the head.
    """
    check_shapes(model, parallel, seq_length)
    config = transformer_config(model, parallel, dtype, precision)
    chunks = []
    for stage in range(parallel.num_virtual_stages_per_pipeline_rank):
        last = stage == parallel.num_virtual_stages_per_pipeline_rank - 1
        chunk = GPT(
            config, model, vocabulary, seq_length, chunk_tokens, mesh.groups,
            pre_process=mesh.is_first_stage and stage == 0,
            post_process=mesh.is_last_stage and last,
            vp_stage=None if parallel.virtual_stages is None else stage,
            precision=precision,
        )  # fmt: skip
        chunks.append(chunk)
    return chunks
