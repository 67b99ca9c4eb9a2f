"""The checks of each section of the configuration by itself, and the sizes that it derives."""

from __future__ import annotations

import ast
import inspect
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from megatron_salt import cli, config
from megatron_salt.config import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SaltConfig,
    TrainingConfig,
    flag,
)
from megatron_salt.config.run import sections
from megatron_salt.errors import UserError

TEACHER = dict(teacher_load="t", kd_steps=5)
REFUSED = [
    (ModelConfig, dict(num_layers=0), "--num-layers must be at least 1, got 0"),
    (ModelConfig, dict(hidden_dropout=1.5), "--hidden-dropout must be at least 0 and below 1, got 1.5"),
    (ModelConfig, dict(hidden_dropout=1.0), "--hidden-dropout must be at least 0 and below 1, got 1.0"),
    (ModelConfig, dict(attention_dropout=float("nan")), "--attention-dropout must be at least 0 and below 1, got nan"),
    (ModelConfig, dict(init_method_std=1e300), "--init-method-std must lie in [0.0, 1.0], got 1e+300"),
    (ModelConfig, dict(init_method_std=0.0), "--init-method-std must be above 0 and finite, got 0.0"),
    (ModelConfig, dict(norm_epsilon=1e30), "--norm-epsilon must lie in [0.0, 1.0], got 1e+30"),
    (ModelConfig, dict(norm_epsilon=1e-60), "--norm-epsilon must be 0 or between 1.18e-38 and 3.4e+38 in size"),
    (ModelConfig, dict(rotary_base=0.0), "--rotary-base must be above 0 and finite, got 0.0"),
    (ModelConfig, dict(norm_epsilon=float("nan")), "--norm-epsilon"),
    (ModelConfig, dict(init_method_std=-0.1), "--init-method-std must be above 0 and finite, got -0.1"),
    (ModelConfig, dict(swiglu=True, squared_relu=True), "--swiglu and --squared-relu"),
    (ModelConfig, dict(relu=True, gelu_tanh=True), "--relu and --gelu-tanh"),
    (
        ModelConfig,
        dict(hidden_size=100, num_attention_heads=12),
        "--hidden-size 100 is not divisible by --num-attention-heads 12",
    ),
    (ModelConfig, dict(num_query_groups=5), "--num-attention-heads 12 is not divisible by --num-query-groups 5"),
    (ParallelConfig, dict(tensor_model_parallel_size=0), "--tensor-model-parallel-size must be at least 1, got 0"),
    (ParallelConfig, dict(sequence_parallel=True), "--sequence-parallel needs --tensor-model-parallel-size above 1"),
    (ParallelConfig, dict(num_virtual_stages_per_pipeline_rank=2), "--num-virtual-stages-per-pipeline-rank 2 needs"),
    (ParallelConfig, dict(overlap_param_gather=True), "--overlap-param-gather needs --use-distributed-optimizer"),
    (ParallelConfig, dict(recompute_granularity="full"), "--recompute-granularity full needs --recompute-method"),
    (ParallelConfig, dict(recompute_granularity="selective", recompute_num_layers=1), "got --recompute-granularity selective"),
    (
        ParallelConfig,
        dict(distributed_timeout_minutes=0.0),
        "--distributed-timeout-minutes must be above 0 and finite, got 0.0",
    ),
    (TrainingConfig, dict(micro_batch_size=0), "--micro-batch-size must be at least 1, got 0"),
    (TrainingConfig, dict(train_iters=5, train_samples=10), "--train-iters 5 and --train-samples 10"),
    (TrainingConfig, dict(profile=True, profile_step_start=5, profile_step_end=5), "--profile-step-end 5 must be after"),
    (TrainingConfig, dict(profile=True, profile_ranks=(-1,)), "--profile-ranks"),
    (TrainingConfig, dict(exit_duration_in_mins=-1.0), "--exit-duration-in-mins must be at least 0, got -1.0"),
    (OptimizerConfig, dict(lr=float("nan")), "--lr must be at least 0, got nan"),
    (OptimizerConfig, dict(lr=float("inf")), "--lr must be finite, got inf"),
    (OptimizerConfig, dict(lr=1e-4, min_lr=1e-3), "--min-lr 0.001 is above --lr 0.0001"),
    (OptimizerConfig, dict(adam_beta2=1.5), "--adam-beta2 must be at least 0 and below 1, got 1.5"),
    (OptimizerConfig, dict(adam_beta1=1.0), "--adam-beta1 must be at least 0 and below 1, got 1.0"),
    (OptimizerConfig, dict(adam_beta2=1.0), "--adam-beta2 must be at least 0 and below 1, got 1.0"),
    (OptimizerConfig, dict(adam_beta1=-0.1), "--adam-beta1 must be at least 0 and below 1, got -0.1"),
    (OptimizerConfig, dict(adam_eps=0.0), "--adam-eps must be above 0 and finite, got 0.0"),
    (OptimizerConfig, dict(adam_eps=1e-50), "--adam-eps must be 0 or between 1.18e-38 and 3.4e+38 in size"),
    (OptimizerConfig, dict(adam_eps=2.0), "--adam-eps must lie in [0.0, 1.0], got 2.0"),
    (
        OptimizerConfig,
        dict(lr=1e300),
        "--lr must be 0 or between 1.18e-38 and 3.4e+38 in size, as float32 holds it, got 1e+300",
    ),
    (OptimizerConfig, dict(lr=1.0, weight_decay=1.0), "--lr 1.0 x --weight-decay 1.0 must be below 1"),
    (OptimizerConfig, dict(lr=1.0, end_weight_decay=2.0), "--lr 1.0 x --end-weight-decay 2.0 must be below 1"),
    (OptimizerConfig, dict(lr_warmup_init=0.1), "--lr-warmup-init 0.1 is above --lr 0.0003"),
    (TrainingConfig, dict(seed=10**19), f"--seed must be at most {2**62} in size, got {10**19}"),
    (TrainingConfig, dict(seed=-1), "--seed must be at least 0, got -1"),
    (
        SaltConfig,
        TEACHER | dict(kd_teacher_temperature=1e-9),
        "--kd-teacher-temperature must lie in [0.001, 1000.0], got 1e-09",
    ),
    (OptimizerConfig, dict(lr_warmup_fraction=0.1, lr_warmup_iters=5), "--lr-warmup-fraction 0.1 and --lr-warmup-iters 5"),
    (OptimizerConfig, dict(lr_decay_style="WSD"), "--lr-decay-style WSD needs --lr-wsd-decay-iters"),
    (OptimizerConfig, dict(override_opt_param_scheduler=True, use_checkpoint_opt_param_scheduler=True), "contradict"),
    (DataConfig, dict(valid_share=0.6), "--valid-share must lie in [0.0, 0.5], got 0.6"),
    (DataConfig, dict(valid_share=0.1, valid_data_path=("v",)), "--valid-share 0.1 and --valid-data-path v"),
    (CheckpointConfig, dict(save_interval=5), "--save-interval 5 needs --save"),
    (CheckpointConfig, dict(finetune=True), "--finetune needs --load"),
    (CheckpointConfig, dict(finetune=True, new_data=True, load="x"), "--finetune starts at step 0"),
    (CheckpointConfig, dict(save_at=(5, 7)), "--save-at 5 7 needs --save"),
    (CheckpointConfig, dict(save="x", save_at=(0, 5)), "--save-at must be at least 1, got 0 5"),
    (SaltConfig, dict(kd_steps=5), "--kd-steps 5 needs a teacher: give --teacher-load"),
    (SaltConfig, dict(teacher_load="t"), "--teacher-load t needs --kd-steps, the length of stage 1"),
    (SaltConfig, TEACHER | dict(let_steps=4), "--let-steps 4 needs --guide hidden or both, got --guide soft-labels"),
    (SaltConfig, TEACHER | dict(let_weight=0.3), "--let-weight 0.3 needs --guide hidden or both, got --guide soft-labels"),
    (SaltConfig, dict(let_layer=2), "--let-layer 2 needs --guide hidden or both"),
    (SaltConfig, TEACHER | dict(let_decay="step"), "--let-decay step needs --guide hidden or both"),
    (SaltConfig, TEACHER | dict(guide="both"), "--guide both needs --let-steps"),
    (SaltConfig, dict(guide="hidden", let_steps=4), "--guide hidden needs a teacher: give --teacher-load"),
    (
        SaltConfig,
        TEACHER | dict(guide="hidden", let_steps=4),
        "--kd-steps 5 is the length of soft labels, and --guide hidden has none",
    ),
    (
        SaltConfig,
        dict(teacher_load="t", guide="both", let_steps=4),
        "--teacher-load t needs --kd-steps, the steps with soft labels",
    ),
    (
        SaltConfig,
        dict(teacher_load="t", guide="hidden", let_steps=4, kd_transition="linear", kd_transition_steps=2),
        "--kd-transition-steps 2 fades soft labels out, and --guide hidden has none",
    ),
    (
        SaltConfig,
        dict(teacher_load="t", guide="hidden", let_steps=4, kd_weight=0.5),
        "--kd-weight 0.5 is about soft labels, and --guide hidden has none",
    ),
    (
        SaltConfig,
        dict(teacher_load="t", guide="hidden", let_steps=4, teacher_fp8_format="hybrid"),
        "--teacher-fp8-format hybrid is checked by the teacher's distribution, and --guide hidden loads no output layer",
    ),
    (
        SaltConfig,
        TEACHER | dict(guide="both", let_steps=4, kd_stop="crossover"),
        "--kd-stop crossover ends soft labels, and --guide both",
    ),
    (SaltConfig, TEACHER | dict(guide="both", let_steps=0), "--let-steps must be at least 1, got 0"),
    (SaltConfig, TEACHER | dict(guide="both", let_steps=4, let_layer=0), "--let-layer must be at least 1, got 0"),
    (SaltConfig, TEACHER | dict(guide="both", let_steps=4, let_weight=-0.1), "--let-weight must be at least 0, got -0.1"),
    (SaltConfig, dict(teacher_cache="c"), "--teacher-cache c needs --teacher-load"),
    (SaltConfig, dict(stage2_micro_batch_size=2), "--stage2-micro-batch-size 2 needs a stage 1"),
    (SaltConfig, TEACHER | dict(kd_steps=0), "--kd-steps must be at least 1, got 0"),
    (SaltConfig, TEACHER | dict(kd_weight=1.01), "--kd-weight must lie in [0.0, 1.0], got 1.01"),
    (SaltConfig, TEACHER | dict(kd_weight=-0.1), "--kd-weight must lie in [0.0, 1.0], got -0.1"),
    (SaltConfig, TEACHER | dict(kd_weight=float("nan")), "--kd-weight must lie in [0.0, 1.0], got nan"),
    (SaltConfig, TEACHER | dict(kd_teacher_temperature=0.0), "--kd-teacher-temperature must be above 0 and finite, got 0.0"),
    (SaltConfig, TEACHER | dict(kd_teacher_temperature=-1.0), "--kd-teacher-temperature must be above 0 and finite, got -1.0"),
    (SaltConfig, TEACHER | dict(kd_teacher_temperature=float("inf")), "--kd-teacher-temperature must be above 0 and finite"),
    (
        SaltConfig,
        TEACHER | dict(kd_transition="linear", kd_transition_steps=6),
        "--kd-transition-steps 6 is longer than stage 1, --kd-steps 5",
    ),
    (SaltConfig, TEACHER | dict(kd_transition="ratio"), "--kd-transition ratio does not go with --kd-transition-steps 0"),
    (SaltConfig, TEACHER | dict(kd_transition_steps=2), "--kd-transition step does not go with --kd-transition-steps 2"),
    (
        SaltConfig,
        TEACHER | dict(kd_transition="ratio", kd_transition_steps=2, kd_weight=1.0),
        "--kd-transition ratio needs --kd-weight below 1",
    ),
    (SaltConfig, TEACHER | dict(kd_gate="top:5"), "--kd-gate must be none, probability:P, rank:K or entropy:E, got 'top:5'"),
    (SaltConfig, TEACHER | dict(kd_gate="rank:0"), "--kd-gate rank:0: the bound of a rank is a whole number from 1 on"),
    (SaltConfig, TEACHER | dict(kd_gate="rank:2.5"), "--kd-gate rank:2.5: the bound of a rank is a whole number from 1 on"),
    (
        SaltConfig,
        TEACHER | dict(kd_gate="probability:1"),
        "--kd-gate probability:1: the bound of a probability lies between 0 and 1",
    ),
    (SaltConfig, TEACHER | dict(kd_gate="probability:nan"), "--kd-gate probability:nan: the bound of a probability lies"),
    (
        SaltConfig,
        TEACHER | dict(kd_gate="entropy:0"),
        "--kd-gate entropy:0: the bound of an entropy is above 0 and finite, in nats",
    ),
    (SaltConfig, TEACHER | dict(kd_gate="entropy"), "--kd-gate entropy: the bound of an entropy is above 0 and finite"),
    (
        SaltConfig,
        dict(teacher_load="t", guide="hidden", let_steps=5, kd_gate="rank:5"),
        "--kd-gate rank:5 is about soft labels, and --guide hidden has none",
    ),
    (
        SaltConfig,
        dict(teacher_load="t", guide="hidden", let_steps=5, kd_weight_schedule=("1:0.5", "3:0.1")),
        "--kd-weight-schedule 1:0.5 3:0.1 is about soft labels, and --guide hidden has none",
    ),
    (SaltConfig, dict(kd_gate="rank:5"), "--kd-gate rank:5 asks what the teacher knows: it needs --teacher-load"),
    (SaltConfig, dict(kd_weight_schedule=("1:0.5",)), "--kd-weight-schedule 1:0.5 needs --teacher-load"),
    (
        SaltConfig,
        TEACHER | dict(kd_weight_schedule=("0.5",)),
        "--kd-weight-schedule 0.5: each entry is STEP:VALUE, with steps from 1",
    ),
    (SaltConfig, TEACHER | dict(kd_weight_schedule=("0:0.5",)), "--kd-weight-schedule 0:0.5: each entry is STEP:VALUE"),
    (SaltConfig, TEACHER | dict(kd_weight_schedule=("1:1.5",)), "--kd-weight-schedule 1:1.5: the value must lie in [0, 1]"),
    (SaltConfig, TEACHER | dict(kd_weight_schedule=("1:x",)), "with spaces between entries, and 'x' is no number"),
    (SaltConfig, TEACHER | dict(kd_weight_schedule=("1: 0.5",)), "with spaces between entries, and ' 0.5' is no number"),
    (
        SaltConfig,
        TEACHER | dict(kd_weight_schedule=("1:0.9,4:0.3",)),
        "--kd-weight-schedule 1:0.9,4:0.3: each entry is STEP:VALUE",
    ),
    (
        SaltConfig,
        TEACHER | dict(kd_weight_schedule=("9" * 5000 + ":0.5",)),
        ":0.5: each entry is STEP:VALUE, with steps from 1",
    ),
    (SaltConfig, TEACHER | dict(kd_gate="rank:" + "9" * 5000), "9: the bound of a rank is a whole number from 1 on"),
    (SaltConfig, TEACHER | dict(kd_gate="entropy:1\n"), ": the bound of an entropy is above 0 and finite"),
    (
        SaltConfig,
        TEACHER | dict(kd_gate="probability:1e-60"),
        "--kd-gate probability:1e-60: float32 cannot tell the bound from 0; take at least 1e-30",
    ),
    (
        SaltConfig,
        TEACHER | dict(kd_temperature_schedule=("2:0",)),
        "--kd-temperature-schedule 2:0: the value must lie in [0.001, 1000]",
    ),
    (
        SaltConfig,
        TEACHER | dict(kd_weight_schedule=("3:0.5", "3:1")),
        "--kd-weight-schedule 3:0.5 3:1: steps must ascend, and 3 follows 3",
    ),
    (
        SaltConfig,
        TEACHER | dict(kd_weight_schedule=("1:0.5", "6:1")),
        "--kd-weight-schedule 6:1 lies beyond stage 1, which has --kd-steps",
    ),
    (
        SaltConfig,
        TEACHER | dict(kd_transition="ratio", kd_transition_steps=2, kd_weight_schedule=("1:0.5", "3:1")),
        "--kd-transition ratio needs values below 1 in --kd-weight-schedule",
    ),
    (SaltConfig, TEACHER | dict(kd_stop_margin=1.5), "--kd-stop-margin must lie in [-1.0, 1.0], got 1.5"),
    (
        SaltConfig,
        TEACHER | dict(teacher_tensor_model_parallel_size=0),
        "--teacher-tensor-model-parallel-size must be at least 1, got 0",
    ),
    (SaltConfig, TEACHER | dict(teacher_micro_batch_size=0), "--teacher-micro-batch-size must be at least 1, got 0"),
    (
        SaltConfig,
        TEACHER | dict(teacher_exchange_max_gib=0.0),
        "--teacher-exchange-max-gib must be above 0 and finite, got 0.0",
    ),
    (LoggingConfig, dict(log_interval=0), "--log-interval must be at least 1, got 0"),
]


@pytest.mark.parametrize("section, values, named", REFUSED, ids=lambda value: str(value) if isinstance(value, str) else "")
def test_a_section_refuses_what_cannot_be(section, values, named):
    with pytest.raises(UserError) as refused:
        section(**values)
    assert named in str(refused.value)


NUMBERS = [(section, leaf.name) for section in sections().values() for leaf in fields(section) if "float" in str(leaf.type)]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e300", "1e-300"])
@pytest.mark.parametrize("section, name", NUMBERS, ids=[name for _, name in NUMBERS])
def test_every_float_is_finite_and_fits_into_float32(section, name, value):
    with pytest.raises(UserError, match=flag(name)):
        section(**({name: float(value)} | (TEACHER if section is SaltConfig else {})))


COUNTS = [
    (section, leaf.name)
    for section in sections().values()
    for leaf in fields(section)
    if str(leaf.type) in ("int", "int | None", "tuple[int, ...]")
]


@pytest.mark.parametrize("value", [2**63, -(2**63)])
@pytest.mark.parametrize("section, name", COUNTS, ids=[name for _, name in COUNTS])
def test_every_count_fits_into_int64(section, name, value):
    with pytest.raises(UserError, match=flag(name)):
        section(**{name: (value,) if name in ("save_at", "profile_ranks") else value})


def test_the_defaults_stand():
    RunConfig()


def test_sections_are_values():
    with pytest.raises(FrozenInstanceError):
        ModelConfig().num_layers = 3  # type: ignore[misc]
    assert ModelConfig() == ModelConfig() and hash(RunConfig()) == hash(RunConfig())


@pytest.mark.parametrize(
    "values, derived",
    [
        (dict(hidden_size=768, num_attention_heads=12), (12, 64, 3072)),
        (dict(hidden_size=64, num_attention_heads=8, num_query_groups=2, kv_channels=32, ffn_hidden_size=100), (2, 32, 100)),
        (dict(hidden_size=768, num_attention_heads=12, swiglu=True), (12, 64, 2048)),
        (dict(hidden_size=100, num_attention_heads=10, swiglu=True), (10, 10, 320)),  # 266.7 rounded up to a multiple of 64
    ],
)
def test_derived_sizes(values, derived):
    model = ModelConfig(**values)
    assert (model.query_groups, model.head_width, model.ffn_width) == derived


@pytest.mark.parametrize("vocabulary_size, rows", [(1, 128), (128, 128), (129, 256), (50257, 50304)])
def test_the_vocabulary_is_padded_up_to_the_multiple(vocabulary_size, rows):
    assert ModelConfig().padded_vocabulary_size(vocabulary_size) == rows


def test_every_leaf_has_a_help_text():
    """The docstring after a field is its help text."""
    for section in sections().values():
        tree = ast.parse(inspect.getsource(section)).body[0]
        assert isinstance(tree, ast.ClassDef)
        documented = {
            before.target.id
            for before, after in zip(tree.body, tree.body[1:], strict=False)
            if isinstance(before, ast.AnnAssign)
            and isinstance(before.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        }
        assert {field.name for field in fields(section)} <= documented


def test_messages_spell_flags_that_exist():
    """Each --word in config/ is a flag: a renamed field must change the messages too."""
    known = set(cli.known_flags(cli.CommandLine))
    source = "\n".join(file.read_text() for file in Path(inspect.getfile(config)).parent.glob("*.py"))
    words = {word.strip("`.,;:)'\"") for text in source.split() for word in [text.lstrip("`(\"'f")] if word.startswith("--")}
    assert sorted(word for word in words if word not in known and "{" not in word and len(word) > 2) == []


def test_flag_spelling():
    assert flag("tensor_model_parallel_size") == "--tensor-model-parallel-size"
