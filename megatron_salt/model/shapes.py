"""Whether a model fits a layout: pure arithmetic on the flags, before anything is allocated or started."""

from __future__ import annotations

from megatron_salt.config import DataConfig, ModelConfig, ParallelConfig, flag
from megatron_salt.errors import UserError


def _divides(what: str, size: int, why: str, parts: int) -> None:
    if size % parts:
        raise UserError(f"{what} {size} is not divisible by {why} = {parts}")


def check_shapes(model: ModelConfig, parallel: ParallelConfig, seq_length: int) -> None:
    """Raise UserError if the model cannot be divided as the flags say. The message names both flags and the numbers."""
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    tp_flag, cp_flag = flag("tensor_model_parallel_size"), flag("context_parallel_size")
    _divides("--num-attention-heads", model.num_attention_heads, tp_flag, tensor)
    _divides("--num-query-groups", model.query_groups, tp_flag, tensor)
    _divides("--ffn-hidden-size", model.ffn_width, tp_flag, tensor)
    _divides("--make-vocab-size-divisible-by", model.make_vocab_size_divisible_by, tp_flag, tensor)
    if context > 1:
        _divides("--seq-length", seq_length, f"2 x {cp_flag}", 2 * context)
    if parallel.sequence_parallel:
        _divides("--seq-length", seq_length, f"{cp_flag} x {tp_flag} (under --sequence-parallel)", context * tensor)
    if model.max_position_embeddings is not None and model.max_position_embeddings < seq_length:
        raise UserError(f"--seq-length {seq_length} is longer than --max-position-embeddings {model.max_position_embeddings}")
    layers_per_stage(model, parallel)


def layers_per_stage(model: ModelConfig, parallel: ParallelConfig) -> list[int]:
    """Layers of each pipeline rank, over all its virtual stages. Raises UserError if they cannot be divided evenly."""
    stages, virtual = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    embedding, loss = parallel.account_for_embedding_in_pipeline_split, parallel.account_for_loss_in_pipeline_split
    pp_flag = flag("pipeline_model_parallel_size")
    if first is not None or last is not None:
        if embedding or loss:
            raise UserError(
                "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers cannot be combined with "
                "--account-for-embedding-in-pipeline-split and --account-for-loss-in-pipeline-split"
            )
        if stages == 1:
            raise UserError(
                f"--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers need {pp_flag} above 1, got 1"
            )
        others = stages - (first is not None) - (last is not None)
        rest = model.num_layers - (first or 0) - (last or 0)
        if rest < 0 or (rest % others if others else rest):
            raise UserError(
                f"--num-layers {model.num_layers} less --decoder-first-pipeline-num-layers {first} and "
                f"--decoder-last-pipeline-num-layers {last} leaves {rest} for {others} stages of {pp_flag} {stages}"
            )
        middle = [rest // others] * others if others else []
        layers = ([] if first is None else [first]) + middle + ([] if last is None else [last])
    else:
        counted = model.num_layers + embedding + loss
        what = "--num-layers (with the embedding and loss that are counted as layers)" if embedding or loss else "--num-layers"
        _divides(what, counted, f"{pp_flag} x --num-virtual-stages-per-pipeline-rank", stages * virtual)
        layers = [counted // stages] * stages
        layers[0] -= embedding
        layers[-1] -= loss
    for stage, count in enumerate(layers):
        if count % virtual and not (embedding or loss):
            virtual_flag = flag("num_virtual_stages_per_pipeline_rank")
            raise UserError(f"{count} layers of pipeline stage {stage} are not divisible by {virtual_flag} {virtual}")
    if min(layers) < 1:
        raise UserError(f"--num-layers {model.num_layers} over {pp_flag} {stages} leaves a stage without a layer: {layers}")
    return layers


def check_masking(model: ModelConfig, data: DataConfig) -> None:
    """Raise UserError for document masking that has no effect on this position embedding."""
    if data.reset_position_ids and not data.reset_attention_mask and model.position_embedding_type == "rope":
        raise UserError(
            "--reset-position-ids has no effect with --position-embedding-type rope, which sees only distances; "
            "add --reset-attention-mask, or drop it"
        )
