"""The decoder: megatron-core's embedding, rotary table and transformer block, and our output head.

The only module that makes a TransformerConfig. `GPT.forward` returns hidden states on every stage; on the last stage
`GPT.loss` turns them into a loss. State-dict keys are those of megatron-core's GPTModel: each loads the other's checkpoints.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from copy import copy

import torch
from torch import Tensor

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import layers as tensor_parallel_layers
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_salt.config import ModelConfig, ParallelConfig
from megatron_salt.data.batch import Microbatch
from megatron_salt.model.attention import attention_mask
from megatron_salt.model.guidance.term import Guide
from megatron_salt.model.head import OutputHead
from megatron_salt.model.layers import ForwardContext, activation_of, block_spec, fp8_products
from megatron_salt.model.loss import SoftTarget
from megatron_salt.model.precision import TORCH, Precision
from megatron_salt.model.shapes import check_shapes
from megatron_salt.parallel.device import SENDS_COPY
from megatron_salt.parallel.mesh import Mesh


def rotary_frequencies(model: ModelConfig, device: torch.device | int) -> Tensor:
    """Radians a position by which each pair of a head's channels is rotated: float32 [rotated channels / 2].

    A linear scaling divides all frequencies by the factor. llama3 divides those whose waves fit at most `low` times into the original
    context, none that fit at least `high` times, and the others by something between, as Llama 3.1 does (its model card and code;
    Hugging Face's "rope_type": "llama3").
    """
    rotated = model.head_width if model.rotary_percent == 1 else int(model.head_width * model.rotary_percent)
    frequencies = 1.0 / (model.rotary_base ** (torch.arange(0, rotated, 2, dtype=torch.float32, device=device) / rotated))
    if model.rope_scaling == "none":
        return frequencies
    if model.rope_scaling == "linear":
        return frequencies / model.rope_scaling_factor
    low, high = model.rope_scaling_low_freq_factor, model.rope_scaling_high_freq_factor
    waves = model.rope_scaling_original_context * frequencies / (2 * math.pi)
    kept = ((waves - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / model.rope_scaling_factor)


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, precision: Precision = TORCH
) -> TransformerConfig:
    """megatron-core's configuration of one model in one layout. dtype of parameters and activations: float32 or bfloat16."""
    interleaved = parallel.virtual_stages is not None
    engine = precision.implementation == "transformer_engine"
    activation = activation_of(model, compiled=engine)  # torch compiles at the first call; only a GPU is worth that wait
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
        activation_func=activation.function,
        add_bias_linear=not model.disable_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
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
        # Transformer Engine's linears add to main_grad by themselves; megatron-core's need the kernel of apex.
        gradient_accumulation_fusion=engine or tensor_parallel_layers._grad_accum_fusion_available,
        # A batch of point-to-point operations must not have two between the same ranks. Interleaving would make such batches.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        batch_p2p_sync=False,  # the wait for the whole device after each batch of sends was a cure for an old release of torch
        deallocate_pipeline_outputs=SENDS_COPY,
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),  # --deterministic, on a GPU
        masked_softmax_fusion=False,
        bias_activation_fusion=activation.fused,
        bias_dropout_fusion=engine,
        apply_rope_fusion=engine and model.position_embedding_type == "rope",
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


class GPT(LanguageModule):
    """One model chunk: the layers of one (virtual) pipeline stage, with the embedding on the first and the head on the last."""

    def __init__(
        self, config: TransformerConfig, model: ModelConfig, *, vocabulary_size: int, seq_length: int, chunk_tokens: int,
        groups: ProcessGroupCollection, pre_process: bool, post_process: bool, vp_stage: int | None, has_head: bool = True,
        precision: Precision = TORCH,
    ) -> None:  # fmt: skip
        """has_head: False for the body of a teacher. Then the last stage ends with the final norm, and a tied weight is only the embedding.

        precision: the same that `config` was made with.
        """
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
        self.padded_vocabulary_size = model.padded_vocabulary_size(vocabulary_size)
        self.max_sequence_length = model.max_position_embeddings or seq_length
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config, vocab_size=self.padded_vocabulary_size, max_sequence_length=self.max_sequence_length,
                position_embedding_type=model.position_embedding_type, tp_group=groups.tp,
            ).to(config.params_dtype)  # fmt: skip  # megatron-core makes learned positions in float32, whatever the config says
        self.rotary_pos_emb = None
        if model.position_embedding_type == "rope":
            self.rotary_pos_emb = RotaryEmbedding(
                kv_channels=model.head_width, rotary_percent=model.rotary_percent, rotary_base=model.rotary_base,
                use_cpu_initialization=config.use_cpu_initialization, cp_group=groups.cp,
            )  # fmt: skip
            # megatron-core knows one kind of scaling, with three of its numbers fixed
            self.rotary_pos_emb.inv_freq = rotary_frequencies(model, self.rotary_pos_emb.inv_freq.device)
        self.decoder = TransformerBlock(
            config=config, spec=block_spec(config, model, precision, groups.pp.rank(), vp_stage), pre_process=pre_process,
            post_process=post_process, pg_collection=groups, vp_stage=vp_stage,
        )  # fmt: skip
        if post_process and has_head:
            head_config = copy(config)
            head_config.gradient_accumulation_fusion = tensor_parallel_layers._grad_accum_fusion_available
            self.output_layer = OutputHead(
                config.hidden_size, self.padded_vocabulary_size, config=head_config, init_method=config.init_method,
                skip_weight_param_allocation=pre_process and self.share_embeddings_and_output_weights, tp_group=groups.tp,
                vocabulary_size=vocabulary_size, chunk_tokens=chunk_tokens,
            )  # fmt: skip
        if has_head and (pre_process or post_process):
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, tensor: Tensor | list[Tensor]) -> None:
        """Take the hidden states of the previous stage. The pipeline schedules call it."""
        self.decoder.set_input_tensor(tensor[0] if isinstance(tensor, list) else tensor)

    def inputs(self, batch: Microbatch) -> tuple[Tensor, Tensor, Tensor | None]:
        """What `forward` takes of a microbatch, this rank's share of it on its device: (tokens, position ids, attention mask)."""
        length = batch.tokens.size(1) * self.cp_group.size()
        return batch.tokens, batch.position_ids, self.attention_mask(batch.documents, length, batch.tokens.device)

    def attention_mask(self, documents: Tensor | None, length: int, device: torch.device) -> Tensor | None:
        """The mask that `forward` takes for sequences of `length` tokens, see attention.py.

        None for Transformer Engine's attention: it is causal without a mask, over context-parallel ranks too.
        """
        if not self.precision.torch_attention:
            assert documents is None, "a model whose data has document masks is built with `document_masks`"
            return None
        return attention_mask(documents, length, self.cp_group, device)

    def forward(
        self, tokens: Tensor, position_ids: Tensor, attention_mask: Tensor | None, guide: Guide | None = None
    ) -> Tensor:
        """Hidden states [s/cp, b, h], with sequence parallelism [s/cp/tp, b, h].

        tokens, position_ids: int64 [b, s/cp]. attention_mask: what `attention_mask()` returns. guide: hidden-state guidance of the batch;
        only a chunk that holds its layer uses it.
        """
        embedded = self.embedding(input_ids=tokens, position_ids=position_ids) if self.pre_process else None
        rotary = None
        if self.rotary_pos_emb is not None:
            length = self.rotary_pos_emb.get_rotary_seq_len(None, self.decoder, embedded, self.config, None)
            rotary = self.rotary_pos_emb(length)
        with self.forward_context():
            return self.decoder(
                hidden_states=embedded, attention_mask=attention_mask, rotary_pos_emb=rotary, attention_bias=guide
            )

    def loss(
        self, hidden: Tensor, labels: Tensor, loss_mask: Tensor, teacher: SoftTarget | None = None
    ) -> tuple[Tensor, Tensor]:
        """On the last stage: (summed loss, metric sums), see head.py, of the hidden states that `forward` returned.

        labels, loss_mask: [b, s/cp].
        """
        return self.output_layer(hidden, labels, loss_mask, weight=self._tied_weight(), teacher=teacher)

    def logits(self, hidden: Tensor) -> Tensor:
        """On the last stage: logits [s/cp, b, padded_vocabulary_size / tp] of hidden states, for generation and tests."""
        return self.output_layer(hidden, weight=self._tied_weight())[0]

    def output_weight(self) -> Tensor:
        """On the last stage: this rank's rows of the output weight [V/tp, h]."""
        tied = self._tied_weight()
        return self.output_layer.weight if tied is None else tied

    def _tied_weight(self) -> Tensor | None:
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The word embedding on the first stage, the head's copy on the last stage, None between. megatron-core calls this."""
        if self.pre_process:
            return self.embedding.word_embeddings.weight
        return self.output_layer.weight if self.post_process else None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """megatron-core's sharded state dict without the empty extra state of the head, as GPTModel has it."""
        if not self.has_head:  # LanguageModule's method would look for a head
            return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        extra = state.pop(f"{prefix}output_layer._extra_state", None)
        assert not (extra and extra.data), "the output head has no extra state"
        return state


def build_model(
    model: ModelConfig, parallel: ParallelConfig, seq_length: int, vocabulary_size: int, dtype: torch.dtype, chunk_tokens: int, mesh: Mesh,
    precision: Precision = TORCH,
) -> list[GPT]:  # fmt: skip
    """This rank's model chunks on its device, one for each virtual stage. Collective over the embedding group if weights are tied.

    vocabulary_size: ids of the tokenizer, without padding. chunk_tokens: tokens whose logits exist at one time in the head.
    """
    check_shapes(model, parallel, seq_length)
    config = transformer_config(model, parallel, dtype, precision)
    chunks = []
    for stage in range(parallel.num_virtual_stages_per_pipeline_rank):
        last = stage == parallel.num_virtual_stages_per_pipeline_rank - 1
        chunk = GPT(
            config, model,
            vocabulary_size=vocabulary_size, seq_length=seq_length, chunk_tokens=chunk_tokens, groups=mesh.groups,
            pre_process=mesh.is_first_stage and stage == 0,
            post_process=mesh.is_last_stage and last,
            vp_stage=None if parallel.virtual_stages is None else stage,
            precision=precision,
        )  # fmt: skip
        chunks.append(chunk)
    return chunks
