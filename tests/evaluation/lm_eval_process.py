"""A program of its own: lm-evaluation-harness on a directory of transformers, with the tasks of a folder. Prints JSON.

python -m tests.evaluation.lm_eval_process MODEL TASK_FOLDER TASK ...
"""

from __future__ import annotations

import json
import sys


def main(model: str, folder: str, *tasks: str) -> None:
    """{task: {"log_likelihoods": [...], "greedy": [...], "metrics": {name: value}}}, requests in the order of the task file."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=4),
        tasks=list(tasks),
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    result = {}
    for task in tasks:
        samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
        answers = [answer for sample in samples for answer in sample["filtered_resps"]]
        metrics = {name.partition(",")[0]: value for name, value in found["results"][task].items() if name.endswith(",none")}
        result[task] = {
            "log_likelihoods": [float(answer[0]) for answer in answers],
            "greedy": [str(answer[1]) == "True" for answer in answers],
            "metrics": {name: value for name, value in metrics.items() if isinstance(value, float)},
        }
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
