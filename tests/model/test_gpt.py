"""The decoder equals plain torch and megatron-core's GPTModel, and starts from the weights that the flags ask for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.utils import get_model_config

from megatron_salt.config import ModelConfig, ParallelConfig
from megatron_salt.data.batch import Microbatch
from megatron_salt.train.step import Student, unwrap
from tests.support import plain_model as plain
from tests.support.gradients import TIED_COPY, whole_gradients, whole_tensors
from tests.support.ranks import run_ranks
from tests.support.small import MODELS, SEQ_LENGTH, VOCABULARY, Case, batch, build_student, make_weights, train, train_student

STEPS = 4
BEYOND_GPT_MODEL = ("gpt-neox", "qwen2", "gelu by tanh")
"""Models with a part that megatron-core's GPTModel does not have, or not with all its numbers."""


# ---- against plain torch ------------------------------------------------------------------------------------------------


def plain_loss(model: ModelConfig, weights: dict[str, Tensor], microbatches: list[Microbatch]) -> Tensor:
    """Mean cross entropy over the valid tokens of all microbatches."""
    total, count = torch.zeros(()), torch.zeros(())
    for part in microbatches:
        mask = torch.ones(SEQ_LENGTH, SEQ_LENGTH).tril().bool().expand(part.tokens.size(0), -1, -1)
        if part.documents is not None:
            mask = mask & (part.documents[:, :, None] == part.documents[:, None, :])
        logits = plain.logits(model, weights, part.tokens, part.position_ids, mask)[..., :VOCABULARY]
        total = total + (F.cross_entropy(logits.transpose(1, 2), part.labels, reduction="none") * part.loss_mask).sum()
        count = count + part.loss_mask.sum()
    return total / count


def train_plain(case: Case, student: Student) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, gradient norms and the first gradient of a run in plain torch, from the student's initial weights."""
    weights = {name: value.clone().requires_grad_() for name, value in whole_tensors(student).items()}
    groups = [
        dict(params=[weight for weight in weights.values() if weight.dim() > 1], weight_decay=0.1),
        dict(params=[weight for weight in weights.values() if weight.dim() == 1], weight_decay=0.0),
    ]
    optimizer = torch.optim.AdamW(groups, lr=case.learning_rate, betas=(0.9, 0.95), eps=1e-8)
    losses, norms, first = [], [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = plain_loss(case.model, weights, batch(student, case, step))
        loss.backward()
        first = first or {name: weight.grad.clone() for name, weight in weights.items()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)))
        losses.append(float(loss))
        optimizer.step()
    return losses, norms, first


def compare_with_plain(case: Case) -> None:
    student = build_student(case, 1)
    with torch.no_grad():  # else biases and norms would start at 0 and 1 and have no influence
        for param in student.chunks[0].parameters():
            param.add_(torch.randn(param.shape, generator=torch.Generator().manual_seed(param.numel())), alpha=0.05)
    student.optimizer.reload_model_params()
    losses, norms, expected = train_plain(case, student)
    gradients = whole_gradients(student, batch(student, case, 0))
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    curve = train_student(student, case, STEPS)
    assert curve.losses == pytest.approx(losses, rel=2e-6)
    assert curve.grad_norms == pytest.approx(norms, rel=2e-5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_training_is_that_of_plain_torch(model, documents):
    """Loss of each token, clipping, AdamW, weight decay of matrices only. Gradients are compared parameter by parameter."""
    run_ranks(1, compare_with_plain, Case(model=MODELS[model], documents=documents))


# ---- against GPTModel ---------------------------------------------------------------------------------------------------


def gpt_model(model: ModelConfig, student: Student) -> GPTModel:
    config = replace(get_model_config(student.chunks[0]), gradient_accumulation_fusion=False)
    spec = get_gpt_layer_local_spec(qk_layernorm=model.qk_layernorm, normalization=model.normalization)
    return GPTModel(
        config, spec, vocab_size=model.padded_vocabulary_size(VOCABULARY), max_sequence_length=SEQ_LENGTH,
        position_embedding_type=model.position_embedding_type, rotary_percent=model.rotary_percent, rotary_base=model.rotary_base,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
    )  # fmt: skip


def compare_with_gpt_model(case: Case) -> None:
    student = build_student(case, 1)
    ours, theirs = unwrap(student.chunks[0]), gpt_model(case.model, student)
    assert ours.state_dict().keys() - theirs.state_dict().keys() == set()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert {name: entry.key for name, entry in ours.sharded_state_dict().items()} == {
        name: entry.key for name, entry in theirs.sharded_state_dict().items()
    }
    microbatch = batch(student, case, 0)[0]
    causal = torch.ones(SEQ_LENGTH, SEQ_LENGTH).triu(1).bool()[None, None]  # True where a query must not attend
    logits = theirs(microbatch.tokens, microbatch.position_ids, causal)[..., :VOCABULARY].transpose(0, 1)
    own_logits = ours.logits(ours(microbatch.tokens, microbatch.position_ids, None))[..., :VOCABULARY]
    torch.testing.assert_close(own_logits, logits, rtol=1e-5, atol=1e-5)
    loss = (
        vocab_parallel_cross_entropy(logits.contiguous().clone(), microbatch.labels.t().contiguous()) * microbatch.loss_mask.t()
    ).sum()
    loss.backward()
    own_loss, _ = ours.loss(ours(microbatch.tokens, microbatch.position_ids, None), microbatch.labels, microbatch.loss_mask)
    assert float(own_loss) == pytest.approx(float(loss), rel=1e-6)
    gradients = whole_gradients(student, [microbatch])
    for name, param in theirs.named_parameters():
        gradient = gradients[name] * microbatch.loss_mask.sum()
        torch.testing.assert_close(gradient, param.grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("model", [name for name in MODELS if name not in BEYOND_GPT_MODEL])
def test_it_is_megatron_cores_gpt_model(model):
    """One state dict, loaded strictly; equal names in checkpoints; equal logits, loss and gradients."""
    run_ranks(1, compare_with_gpt_model, Case(model=MODELS[model]))


def parts_kept_of_state_dict(case: Case) -> set[str]:
    """Names in the state dict with contents that a checkpoint would hold."""
    state = unwrap(build_student(case, 1).chunks[0]).sharded_state_dict()
    return {entry.key for entry in state.values()}


def test_the_checkpoint_has_no_key_of_the_heads_own():
    keys = run_ranks(1, parts_kept_of_state_dict, Case(model=MODELS["untied"]))[0]
    assert {key for key in keys if key.startswith("output_layer")} == {"output_layer.weight"}


# ---- initial weights ----------------------------------------------------------------------------------------------------


def initial_weights(case: Case, world_size: int) -> dict[str, Tensor]:
    return whole_tensors(build_student(case, world_size))


def deviation(case: Case, name: str) -> float | None:
    """The standard deviation that Megatron-LM gives a parameter; None for a constant parameter."""
    std = case.model.init_method_std
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return std / (2 * case.model.num_layers) ** 0.5
    return None if name.endswith(".bias") or "layernorm" in name else std


@pytest.mark.long
@pytest.mark.parametrize("model, sizes, world_size", [
    ("tied", {}, 1),
    ("gpt2", {}, 1),
    ("gpt2", dict(tensor_model_parallel_size=2, sequence_parallel=True), 2),
    ("tied", dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), 4),
    ("untied", dict(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2), 4),
])  # fmt: skip
def test_initial_weights_have_the_statistics_asked_for(model, sizes, world_size):
    """Normal, with Megatron-LM's deviations. All shards and layers differ; replicas and the copies of a tied embedding are equal."""
    case = Case(ParallelConfig(**sizes), replace(MODELS[model], init_method_std=0.03))
    ranks = run_ranks(world_size, initial_weights, case, world_size)
    for name, weight in ranks[0].items():
        expected = deviation(case, name)
        if expected is None:
            assert (weight == (0 if name.endswith(".bias") else 1)).all(), name
            continue
        assert float(weight.std()) == pytest.approx(expected, rel=4 / (2 * weight.numel()) ** 0.5), name
        assert abs(float(weight.mean())) < 4 * expected / weight.numel() ** 0.5, name
        kurtosis = float((weight / weight.std()).pow(4).mean())
        assert abs(kurtosis - 3) < 4 * (24 / weight.numel()) ** 0.5 + 0.05, name
    unlike = [half for name, weight in ranks[0].items() if name.endswith("linear_fc1.weight") for half in weight.chunk(4)]
    assert len({tuple(half[0, :4].tolist()) for half in unlike}) == len(unlike)
    assert len(unlike) == 4 * case.model.num_layers
    for other in ranks[1:]:
        assert all(torch.equal(other[name], weight) for name, weight in ranks[0].items())
    if TIED_COPY in ranks[0]:
        assert torch.equal(ranks[0][TIED_COPY], ranks[0]["embedding.word_embeddings.weight"])
    assert (TIED_COPY in ranks[0]) == (model == "tied" and "pipeline_model_parallel_size" in sizes)


# ---- traps --------------------------------------------------------------------------------------------------------------


def settings(case: Case, world_size: int) -> dict[str, Any]:
    config = get_model_config(build_student(case, world_size).chunks[0])
    return {name: getattr(config, name) for name in ("deallocate_pipeline_outputs", "overlap_p2p_comm", "batch_p2p_comm")}


def waits_for_the_device(case: Case, world_size: int) -> bool:
    return bool(get_model_config(build_student(case, world_size).chunks[0]).batch_p2p_sync)


def test_no_pipeline_stage_waits_for_the_whole_device_after_a_send():
    assert run_ranks(2, waits_for_the_device, Case(ParallelConfig(pipeline_model_parallel_size=2)), 2) == [False, False]


def test_a_stage_keeps_its_output_while_gloo_sends_it():
    """megatron-core 0.16.1 would free it during the send, and losses would be wrong without an error. Nor may a batch have two sends."""
    interleaved = Case(ParallelConfig(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2))
    copies = torch.cuda.is_available()
    assert run_ranks(2, settings, interleaved, 2)[0] == dict(
        deallocate_pipeline_outputs=copies, overlap_p2p_comm=True, batch_p2p_comm=False
    )


def compiled_frames(case: Case) -> dict[str, int]:
    import torch._dynamo

    torch._dynamo.utils.counters.clear()
    train_student(build_student(case, 1), case, 1)
    assert dist.get_world_size() == 1
    return dict(torch._dynamo.utils.counters["frames"])


@pytest.mark.parametrize("model", ["squared relu", "gpt2", "tied", "gpt-neox", "gelu by tanh"])
def test_training_compiles_nothing(model):
    """Therefore it needs no C++ compiler and starts without a delay."""
    assert run_ranks(1, compiled_frames, Case(model=MODELS[model]))[0] == {}


# ---- in bfloat16 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_every_model_trains_in_bfloat16_as_in_float32_but_for_rounding(tmp_path: Path, model: str):
    run_ranks(1, make_weights, Case(model=MODELS[model]), tmp_path / "weights")
    exact, rounded = (
        run_ranks(1, train, Case(model=MODELS[model], dtype=dtype), 1, tmp_path / "weights")[0]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded.losses == pytest.approx(exact.losses, rel=2e-2)
