"""Flags that contradict each other, the layout or the machine: exit status 2, one line with flag and numbers, nothing written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.program import SMALL, checkpoints, refused, refused_at_once, train

TP2 = dict(tensor_model_parallel_size=2)
PP2 = dict(pipeline_model_parallel_size=2)
VP2 = dict(PP2, num_virtual_stages_per_pipeline_rank=2)

KD = dict(teacher_load="/nowhere", kd_steps=3)
LET = dict(teacher_load="/nowhere", guide="hidden", let_steps=4, let_layer=2)


@pytest.mark.parametrize(
    "world_size, flags, words",
    [
        (6, TP2 | PP2, ["6 ranks", "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2", "4 ranks"]),
        (3, dict(context_parallel_size=2), ["3 ranks", "--context-parallel-size 2"]),
        (3, dict(tensor_model_parallel_size=3), ["--num-attention-heads 4", "--tensor-model-parallel-size = 3"]),
        (4, dict(tensor_model_parallel_size=4), ["--num-query-groups 2", "--tensor-model-parallel-size = 4"]),
        (2, dict(TP2, ffn_hidden_size=63), ["--ffn-hidden-size 63", "--tensor-model-parallel-size = 2"]),
        (
            2,
            dict(TP2, make_vocab_size_divisible_by=33),
            ["--make-vocab-size-divisible-by 33", "--tensor-model-parallel-size = 2"],
        ),
        (1, dict(hidden_size=30), ["--hidden-size 30", "--num-attention-heads 4"]),
        (1, dict(num_query_groups=3), ["--num-attention-heads 4", "--num-query-groups 3"]),
        (1, dict(gelu_tanh=True), ["--swiglu and --gelu-tanh"]),
        (
            1,
            dict(rope_scaling="linear", position_embedding_type="none"),
            ["--rope-scaling linear", "--position-embedding-type rope, got none"],
        ),
        (
            1,
            dict(rope_scaling="llama3", rope_scaling_high_freq_factor=1),
            ["--rope-scaling-high-freq-factor 1", "--rope-scaling-low-freq-factor 1"],
        ),
        (1, dict(rope_scaling="linear", rope_scaling_factor=0), ["--rope-scaling-factor must be above 0"]),
        (2, dict(PP2, num_layers=3), ["--num-layers 3", "--pipeline-model-parallel-size", "= 2"]),
        (2, VP2, ["--num-layers 2", "--num-virtual-stages-per-pipeline-rank", "= 4"]),
        (2, dict(PP2, decoder_first_pipeline_num_layers=2), ["--num-layers 2", "--pipeline-model-parallel-size 2", "[2, 0]"]),
        (2, dict(context_parallel_size=2, seq_length=18), ["--seq-length 18", "2 x --context-parallel-size = 4"]),
        (2, dict(TP2, sequence_parallel=True, seq_length=17), ["--seq-length 17", "--tensor-model-parallel-size", "= 2"]),
        (1, dict(sequence_parallel=True), ["--sequence-parallel", "--tensor-model-parallel-size above 1"]),
        (1, dict(max_position_embeddings=8), ["--seq-length 16", "--max-position-embeddings 8"]),
        (1, dict(global_batch_size=9), ["--global-batch-size 9", "--micro-batch-size 2 x 1"]),
        (2, dict(global_batch_size=6), ["--global-batch-size 6", "--micro-batch-size 2 x 2"]),
        (
            2,
            dict(VP2, num_layers=4, global_batch_size=6),
            ["3 microbatches", "--global-batch-size 6", "--pipeline-model-parallel-size 2"],
        ),
        (1, dict(train_iters=None, train_samples=50), ["--train-samples 50", "--global-batch-size 8"]),
        (1, dict(train_iters=None), ["--train-iters", "--train-samples"]),
        (1, dict(train_samples=80), ["--train-iters 4", "--train-samples 80"]),
        (1, dict(train_iters=0), ["--train-iters must be at least 1, got 0"]),
        (1, dict(lr="nan"), ["--lr must be at least 0, got nan"]),
        (1, dict(overlap_param_gather=True), ["--overlap-param-gather needs --use-distributed-optimizer"]),
        (1, dict(reset_position_ids=True), ["--reset-position-ids", "--position-embedding-type rope"]),
        (1, dict(tensor_parallel_size=2), ["unknown flag --tensor-parallel-size", "--tensor-model-parallel-size"]),
        (1, dict(seq_length="long"), ["--seq-length", "long"]),
        (1, dict(config="/nowhere/run.yaml"), ["--config /nowhere/run.yaml cannot be read"]),
        (1, dict(finetune=True), ["--finetune needs --load"]),
        (1, dict(eval_iters=2), ["--eval-iters 2", "--valid-data-path", "--valid-share"]),
        (1, dict(tokenizer_type=None), ["--tokenizer-type is not given", "words"]),
        (
            1,
            dict(tokenizer_type="SentencePieceTokenizer", tokenizer_model="/nowhere/sp.model"),
            ["--tokenizer-model /nowhere/sp.model"],
        ),
        (1, dict(data_path=[]), ["--data-path"]),
        (1, dict(save_at=[2, 5]), ["--save-at 5", "last step, 4"]),
        (1, dict(kd_steps=3), ["--kd-steps 3", "--teacher-load"]),
        (1, dict(teacher_load="/nowhere"), ["--teacher-load /nowhere", "--kd-steps"]),
        (1, dict(KD, kd_weight=1.5), ["--kd-weight must lie in [0.0, 1.0], got 1.5"]),
        (1, dict(KD, kd_weight=-0.5), ["--kd-weight must lie in [0.0, 1.0], got -0.5"]),
        (1, dict(KD, kd_teacher_temperature=0), ["--kd-teacher-temperature must be above 0", "got 0"]),
        (1, dict(KD, kd_gate="rank:0"), ["--kd-gate rank:0", "from 1 on"]),
        (1, dict(KD, kd_weight_schedule=["1:0.5", "4:0.2"]), ["--kd-weight-schedule 4:0.2", "--kd-steps 3"]),
        (1, dict(KD, kd_transition="linear", kd_transition_steps=4), ["--kd-transition-steps 4", "--kd-steps 3"]),
        (1, dict(LET, let_layer=3), ["--let-layer 3", "--num-layers 2"]),
        (1, dict(LET, let_steps=5), ["--let-steps 5", "last step, 4"]),
        (1, dict(LET, guide="both"), ["--teacher-load /nowhere needs --kd-steps"]),
        (1, dict(LET, guide="logits"), ["--guide", "logits"]),
        (1, dict(KD, kd_transition="cosine"), ["--kd-transition", "cosine"]),
        (2, dict(TP2, **KD, teacher_tensor_model_parallel_size=4), ["--teacher-tensor-model-parallel-size 4", "the 2 ranks"]),
        (2, dict(KD, teacher_pipeline_model_parallel_size=2), ["--teacher-pipeline-model-parallel-size 2", "the 1 ranks"]),
        (2, dict(TP2, **KD, seq_length=15), ["--seq-length 15", "--tensor-model-parallel-size", "= 2"]),
        (1, dict(KD, teacher_micro_batch_size=3), ["--teacher-micro-batch-size 3", "--micro-batch-size 2"]),
        (2, dict(KD, teacher_micro_batch_size=8), ["--teacher-micro-batch-size 8", "4 samples", "--global-batch-size 8 / 2"]),
        (2, dict(KD, stage2_micro_batch_size=8), ["--global-batch-size 8", "--stage2-micro-batch-size 8 x 2"]),
        (2, dict(VP2, **KD, num_layers=4, stage2_micro_batch_size=8), ["1 microbatches", "--stage2-micro-batch-size 8"]),
        (1, dict(KD, kd_stop="crossover"), ["--kd-stop crossover", "--eval-iters"]),
        (
            1,
            dict(KD, kd_stop="crossover", eval_iters=1, valid_share=0.1, eval_interval=3),
            ["--kd-stop crossover", "--eval-interval 3"],
        ),
        (
            1,
            dict(transformer_impl="transformer_engine", bf16=True),
            ["--transformer-impl transformer_engine", "is not installed"],
        ),
        (
            1,
            dict(fp8_format="hybrid", bf16=True),
            ["--fp8-format hybrid needs --transformer-impl transformer_engine", "no NVIDIA GPU"],
        ),
        (
            1,
            dict(fp4_format="e2m1", bf16=True),
            ["--fp4-format e2m1 needs --transformer-impl transformer_engine", "no NVIDIA GPU"],
        ),
        (1, dict(fp8_format="hybrid", fp4_format="e2m1"), ["--fp8-format hybrid", "--fp4-format e2m1"]),
        (1, dict(fp8_recipe="mxfp8"), ["--fp8-recipe needs --fp8-format"]),
        (1, dict(fp8_param_gather=True), ["--fp8-param-gather needs --fp8-format"]),
        (
            1,
            dict(fp8_format="e4m3", fp8_recipe="delayed", first_last_layers_bf16=True),
            ["--first-last-layers-bf16", "delayed"],
        ),
        (1, dict(fp8_format="e4m3", fp8_recipe="mxfp8", fp8_margin=1), ["--fp8-margin", "--fp8-recipe delayed", "mxfp8"]),
        (1, dict(first_last_layers_bf16=True), ["--first-last-layers-bf16 needs --fp8-format or --fp4-format"]),
        (1, dict(KD, teacher_fp8_format="e4m3", teacher_fp8_recipe="delayed"), ["--teacher-fp8-recipe delayed", "gradients"]),
        (1, dict(KD, teacher_fp8_recipe="mxfp8"), ["--teacher-fp8-recipe mxfp8 needs --teacher-fp8-format"]),
        (1, dict(teacher_fp8_format="e4m3"), ["--teacher-fp8-format e4m3 needs --teacher-load"]),
        (1, dict(KD, teacher_fp8_max_kl=0), ["--teacher-fp8-max-kl must be above 0"]),
    ],
)
def test_flags_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, data: str, world_size: int,
    flags: dict[str, Any], words: list[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    message = refused_at_once(capsys, tmp_path / "save", **(dict(data_path=data, train_iters=4) | flags))
    assert all(word in message for word in words), message


def test_skipped_ranges_that_make_no_sense(tmp_path: Path, data: str) -> None:
    message = refused(1, data_path=data, train_iters=4, skip_samples="30:20", save=tmp_path)
    assert "--skip-samples" in message and "30:20" in message and list(tmp_path.iterdir()) == []


def test_the_small_run_itself_is_fine(tmp_path: Path, data: str) -> None:
    """Otherwise all tests above would pass for a wrong reason."""
    train(data_path=data, train_iters=4, save=tmp_path)
    assert checkpoints(tmp_path) == [4] and SMALL["num_layers"] == 2
