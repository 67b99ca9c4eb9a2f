"""A study of tiny models, as a user would write it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_salt import yaml_core
from megatron_salt.study.definition.study import Study
from megatron_salt.study.definition.study_file import parse_study

STUDENT = """
model: {num_layers: 4, hidden_size: 16, num_attention_heads: 2, position_embedding_type: rope}
training: {seq_length: 8, micro_batch_size: 2, global_batch_size: 4, train_iters: 100, eval_iters: 2}
optimizer: {lr: 0.001, lr_decay_style: cosine, lr_warmup_iters: 10}
data: {data_path: [data/train], valid_data_path: [data/held]}
checkpoint: {save: elsewhere}
"""
TEACHER = """
model: {num_layers: 1, hidden_size: 8, num_attention_heads: 2, position_embedding_type: rope}
training: {seq_length: 8, micro_batch_size: 2, global_batch_size: 4, train_iters: 200, seed: 7}
data: {data_path: [data/train]}
"""
STUDY = """
output: out
config: student.yaml
seeds: [1, 2]
teacher: {config: teacher.yaml}
teacher_shared_by: 3
salt: {kd_steps: 30, kd_weight: 0.6}
selection: {fraction: 0.5, scorer_step: 80, score: mean_dropped_20}
arms: {baseline: , salt: }
primary: {arm: salt, against: baseline}
"""


def write_configs(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put student.yaml and teacher.yaml into a directory, and go there."""
    (directory / "student.yaml").write_text(STUDENT)
    (directory / "teacher.yaml").write_text(TEACHER)
    monkeypatch.chdir(directory)


def study(**changes: object) -> Study:
    """STUDY with other entries; None removes one. The configs must be there."""
    tree = {name: value for name, value in (yaml_core.load(STUDY) | changes).items() if value is not None}
    return parse_study(yaml_core.dump(tree), "STUDY.yaml")
