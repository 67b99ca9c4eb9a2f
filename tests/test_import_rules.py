"""Which modules may import which, and which may patch: rules of the whole repository, read from the source without importing it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.repository.source_text import ROOT, circular, crowded, distributed, imports, patches, sources, within

PACKAGE = "megatron_salt"

# A module imports its own unit and units of the lines above, never of its own line or below.
LAYERS = (
    ("errors", "yaml_core", "small_files", "cards", "child_processes"),
    ("files", "config"),
    ("cli",),
    ("parallel", "tokenizer"),
    ("data", "metrics"),
    ("model", "preprocess", "selection"),
    ("checkpoint",),
    ("salt", "convert", "evaluation"),
    ("train",),
    ("planner",),
    ("study",),
    ("pretrain", "tools", "benchmarks"),
)
PURE = (  # numpy, the standard library and each other
    "megatron_salt.data.bitmap",
    "megatron_salt.errors",
    "megatron_salt.child_processes",
    "megatron_salt.small_files",
    "megatron_salt.config",
    "megatron_salt.config.checkpoint",
    "megatron_salt.config.checks",
    "megatron_salt.config.data",
    "megatron_salt.config.logging",
    "megatron_salt.config.model",
    "megatron_salt.config.optimizer",
    "megatron_salt.config.parallel",
    "megatron_salt.config.quantization",
    "megatron_salt.config.run",
    "megatron_salt.config.salt",
    "megatron_salt.config.teaching",
    "megatron_salt.config.training",
    "megatron_salt.model.loss_chunk",
    "megatron_salt.checkpoint.integrity",
    "megatron_salt.checkpoint.owner",
    "megatron_salt.checkpoint.run_state",
    "megatron_salt.checkpoint.retention",
    "megatron_salt.checkpoint.save_directory",
    "megatron_salt.preprocess.dedup_shuffle",
    "megatron_salt.data.blend",
    "megatron_salt.preprocess.code_points",
    "megatron_salt.preprocess.inputs",
    "megatron_salt.selection.eligibility",
    "megatron_salt.preprocess.indexed_writer",
    "megatron_salt.preprocess.journal",
    "megatron_salt.data.manifest",
    "megatron_salt.data.order",
    "megatron_salt.files",
    "megatron_salt.data.subsets",
    "megatron_salt.data.duplicate_inputs",
    "megatron_salt.selection.score_reader",
    "megatron_salt.selection.score_format",
    "megatron_salt.selection.rules",
    "megatron_salt.selection.selection_file",
    "megatron_salt.selection.score_writer",
    "megatron_salt.preprocess.sharding",
    "megatron_salt.data.skip_samples",
    "megatron_salt.selection.ties",
    "megatron_salt.data.indexed_dataset",
    "megatron_salt.data.json_records",
    "megatron_salt.data.windows",
    "megatron_salt.model.flops",
    "megatron_salt.model.precision_checks",
    "megatron_salt.model.precision",
    "megatron_salt.model.shapes",
    "megatron_salt.cards",
    "megatron_salt.parallel.hardware",
    "megatron_salt.parallel.layout",
    "megatron_salt.convert.config_reader",
    "megatron_salt.convert.foreign_model",
    "megatron_salt.convert.gguf.architectures",
    "megatron_salt.convert.gguf.rope_factors",
    "megatron_salt.convert.hugging_face.exported_config",
    "megatron_salt.convert.hugging_face.families",
    "megatron_salt.convert.hugging_face.unsupported",
    "megatron_salt.convert.megatron.arguments",
    "megatron_salt.convert.megatron.exported_arguments",
    "megatron_salt.evaluation.metrics",
    "megatron_salt.evaluation.public_tasks.prompts",
    "megatron_salt.evaluation.results",
    "megatron_salt.evaluation.task_file",
    "megatron_salt.salt.cost",
    "megatron_salt.salt.guidance.layer_place",
    "megatron_salt.salt.guidance.what_is_taught",
    "megatron_salt.salt.head_cost",
    "megatron_salt.salt.layer_cost",
    "megatron_salt.salt.routing",
    "megatron_salt.salt.guidance.layer_place",
    "megatron_salt.salt.schedule",
    "megatron_salt.salt.teacher_cache.manifest",
    "megatron_salt.salt.teacher_cache.shards",
    "megatron_salt.metrics.arms",
    "megatron_salt.metrics.figure_text",
    "megatron_salt.metrics.history",
    "megatron_salt.planner.chunk_memory",
    "megatron_salt.salt.guidance.layer_place",
    "megatron_salt.planner.compose",
    "megatron_salt.planner.gpu",
    "megatron_salt.planner.memory",
    "megatron_salt.planner.planned_run",
    "megatron_salt.planner.schedule",
    "megatron_salt.planner.static",
    "megatron_salt.planner.table",
    "megatron_salt.planner.search.report",
    "megatron_salt.planner.search.search",
    "megatron_salt.planner.search.space",
    "megatron_salt.planner.time.machine",
    "megatron_salt.planner.time.payback",
    "megatron_salt.planner.time.report",
    "megatron_salt.planner.time.roofline",
    "megatron_salt.planner.time.timeline",
    "megatron_salt.planner.time.traffic",
    "megatron_salt.planner.time.whole_run",
    "megatron_salt.planner.trace",
    "megatron_salt.study.definition.arms",
    "megatron_salt.study.definition.evaluations",
    "megatron_salt.study.definition.plan_jobs",
    "megatron_salt.study.definition.preparation",
    "megatron_salt.study.definition.study",
    "megatron_salt.study.analysis.crossings",
    "megatron_salt.study.analysis.economics",
    "megatron_salt.study.analysis.ledger",
    "megatron_salt.study.analysis.pairs",
    "megatron_salt.study.analysis.statistics",
    "megatron_salt.study.definition.arms",
    "megatron_salt.study.definition.evaluations",
    "megatron_salt.study.definition.plan_jobs",
    "megatron_salt.study.definition.preparation",
    "megatron_salt.study.definition.study",
    "megatron_salt.study.job",
    "megatron_salt.study.report.content",
    "megatron_salt.study.report.facts",
    "megatron_salt.study.report.markdown",
    "megatron_salt.study.report.sections",
    "megatron_salt.study.report.tables",
    "megatron_salt.study.results",
    "megatron_salt.study.jobs.estimate",
    "megatron_salt.study.jobs.outcome",
    "megatron_salt.study.jobs.progress",
    "megatron_salt.study.jobs.status",
    "megatron_salt.train.launcher",
    "megatron_salt.train.plan",
    "megatron_salt.train.exit",
)
HEAVY = ("torch", "megatron", "tensorboard", "tokenizers", "sentencepiece")
SEAM = "megatron_salt.parallel.cpu_seam"
PROGRAMS = ["megatron_salt/pretrain.py", *sorted(f"tools/{file.name}" for file in ROOT.glob("tools/*.py"))]
MAY_PATCH = {  # None: anything
    SEAM: None,
    "megatron_salt.parallel.adamw": {"sys.modules", "sys.modules['apex.optimizers']"},
    # In a child process alone, inside a block: they read what fake tensors do not have.
    "megatron_salt.planner.tracing.fake_world": {"nn.Module.to", "dist.all_gather_object"},
    # A queue that ends with this process, and that has no results of a save that a failed run left.
    "megatron_salt.checkpoint.async_writer": {"filesystem_async._results_queue"},
    # A switch that torch has for this, and that a process may set.
    "megatron_salt.parallel.launch": {"torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction"},
}


def layer(module: str) -> tuple[int, str]:
    """Number and unit of a module; -1 for the bare package, which everybody may import."""
    parts = module.removeprefix(PACKAGE + ".").split(".")
    if parts == [PACKAGE] or parts[0].startswith("__"):
        return -1, ""
    return next(number for number, units in enumerate(LAYERS) if parts[0] in units), parts[0]


def upward(module: str, source: str) -> list[str]:
    """Imports of this repository against the order of LAYERS."""
    own = layer(module)
    targets = [name for name in imports(source) if any(within(name, top) for top in (PACKAGE, "tools", "benchmarks"))]
    return [name for name in targets if layer(name)[1] != own[1] and layer(name)[0] >= own[0]]


def impure(source: str) -> list[str]:
    """Imports that are neither numpy nor the standard library nor a pure module."""
    allowed = (*sys.stdlib_module_names, "numpy", *PURE)
    return [name for name in imports(source) if not any(within(name, module) for module in allowed)]


def seamless(source: str) -> list[str]:
    """Imports of megatron before the import of the seam."""
    names = imports(source)
    before = names.index(SEAM) if SEAM in names else len(names)
    return [name for name in names[:before] if within(name, "megatron")]


def run(program: str) -> str:
    """What a Python program prints in a process of its own."""
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_imports_go_one_way():
    modules = sources(PACKAGE, "tools", "benchmarks")
    assert {name: upward(name, source) for name, source in modules.items() if upward(name, source)} == {}


def test_no_module_imports_itself_by_way_of_others():
    assert circular(sources(PACKAGE, "tools", "tests", "benchmarks")) == []


def test_no_folder_has_more_than_fifteen_modules():
    """tools/ is a list of programs: each file there has one import and no code."""
    files = [str(file.relative_to(ROOT)) for folder in (PACKAGE, "tests") for file in (ROOT / folder).rglob("*.py")]
    assert crowded(files) == {}
    assert [file.name for file in (ROOT / "tools").glob("*.py") if "def " in file.read_text()] == []


def test_data_knows_nothing_of_ranks():
    modules = sources(f"{PACKAGE}/data")
    assert modules
    assert {name: distributed(source) for name, source in modules.items() if distributed(source)} == {}


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_need_numpy_alone(module):
    assert impure(sources(PACKAGE)[module]) == []


def test_the_cpu_seam_comes_before_megatron():
    modules = sources(PACKAGE, "tools", "benchmarks", "tests", "examples")
    assert {name: seamless(source) for name, source in modules.items() if name != SEAM and seamless(source)} == {}


def test_nothing_but_the_seam_patches_torch_or_megatron():
    modules = sources(PACKAGE, "tools", "benchmarks", "examples")
    found = {name: set(patches(source)) for name, source in modules.items() if patches(source)}
    assert found[SEAM]
    assert {name: what for name, what in found.items() if MAY_PATCH.get(name, set()) not in (None, what)} == {}


@pytest.mark.parametrize("modules", [(PACKAGE, "megatron_salt.cli"), PURE], ids=["package and cli", "pure modules"])
def test_importing_them_does_not_import_torch(modules):
    program = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    loaded = run(program).split()
    assert set(modules) <= set(loaded)
    assert [name for name in loaded if name.split(".")[0] in HEAVY] == []


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_shown_without_torch(program):
    lines = (
        "import runpy, sys",
        f"sys.argv = ['{program}', '--help']",
        "try: runpy.run_path(sys.argv[0], run_name='__main__')",
        "except SystemExit as end: print(f'exit status {end.code}', *sys.modules)",
    )
    shown, _, loaded = run("\n".join(lines)).rpartition("exit status 0")
    assert "--help" in shown
    assert [name for name in loaded.split() if name.split(".")[0] in HEAVY] == []


@pytest.mark.parametrize(
    "rule, source",
    [
        (lambda source: upward("megatron_salt.data.batch", source), "from megatron_salt.model import gpt"),
        (lambda source: upward("megatron_salt.parallel.mesh", source), "def f():\n    import megatron_salt.train.step"),
        (lambda source: upward("megatron_salt.train.step", source), "from megatron_salt.tools import preprocess_data"),
        (lambda source: circular({"a": source, "a.b": "import c", "c": "def f():\n    from a import x"}), "from a import b"),
        (crowded, [f"a/{number}.py" for number in range(16)]),
        (impure, "import torch"),
        (impure, "from megatron_salt.tokenizer.tokenizer import Tokenizer"),
        (seamless, "import megatron.core"),
        (seamless, f"from megatron.core import parallel_state\nimport {SEAM}"),
        (distributed, "import torch.distributed as dist"),
        (distributed, "from torch import distributed"),
        (distributed, "import torch\ntorch.distributed.barrier()"),
        (patches, "import torch\ntorch.empty = None"),
        (patches, "from torch import Tensor\nTensor.cuda = None"),
        (patches, "from megatron.core import parallel_state as mpu\ndel mpu.anything"),
        (patches, "import torch.nn.functional as F\nsetattr(F, 'linear', None)"),
        (patches, "import sys\nsys.modules['apex'] = None"),
        (patches, "import sys\nsys.modules.setdefault('apex', None)"),
    ],
)
def test_each_rule_sees_what_it_forbids(rule, source):
    assert rule(source)
