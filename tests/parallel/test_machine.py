"""A fault of a host is told from a mistake of the user: it names host and device, and has a status and a word of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from megatron_salt import pretrain
from megatron_salt.errors import MachineError, UserError, this_host
from megatron_salt.parallel import failure
from megatron_salt.parallel.hardware import hide_gpus
from megatron_salt.parallel.launch import bind_device, find_hardware
from megatron_salt.parallel.machine import importable, naming_faults, refuse_half_engine, refuse_software
from tests.support.program import argv, write_tokens

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="pretends that there are GPUs, or none")


@pytest.fixture(autouse=True)
def node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node7")


@pytest.fixture
def gpus() -> Iterator[SimpleNamespace]:
    """What torch.cuda answers: eight healthy GPUs, until a test changes that."""
    answers = SimpleNamespace(
        is_available=mock.Mock(return_value=True), device_count=mock.Mock(return_value=8), set_device=mock.Mock(),
        synchronize=mock.Mock(), get_device_capability=mock.Mock(return_value=(9, 0)),
    )  # fmt: skip
    with mock.patch.multiple(torch.cuda, **vars(answers)):
        yield answers


@pytest.mark.parametrize("shown, local_rank, bound", [(8, 3, 3), (8, 0, 0), (1, 0, 0), (1, 3, 0)])
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one_that_it_is_shown(monkeypatch, gpus, shown, local_rank, bound):
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    gpus.device_count.return_value = shown
    assert find_hardware("cuda").capability == (9, 0)
    gpus.set_device.assert_called_once_with(bound)


def test_a_node_that_shows_too_few_gpus_is_at_fault(monkeypatch, gpus):
    monkeypatch.setenv("LOCAL_RANK", "7")
    gpus.device_count.return_value = 7
    with pytest.raises(MachineError, match="^host node7 cannot be used: LOCAL_RANK is 7 but it shows 7 GPUs"):
        bind_device()


@pytest.mark.parametrize("where", ["set_device", "synchronize"])
@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might ..."),
        torch.cuda.DeferredCudaCallError("CUDA call failed lazily at initialization"),
        torch.OutOfMemoryError("CUDA out of memory"),  # another process holds all of it, before this one has allocated anything
    ],
)
def test_a_gpu_that_cannot_be_initialised_is_at_fault(monkeypatch, gpus, where, error):
    monkeypatch.setenv("LOCAL_RANK", "3")
    getattr(gpus, where).side_effect = error
    with pytest.raises(MachineError) as raised:
        bind_device()
    assert str(raised.value) == (
        f"host node7 cannot be used: CUDA device 3 of 8 cannot be initialised: {str(error).splitlines()[0]}"
    )


def test_a_rank_that_must_have_a_gpu_does_not_fall_back_to_the_cpu(monkeypatch):
    assert bind_device("auto") is bind_device("cpu") is False
    monkeypatch.setattr(torch.version, "cuda", None)  # a build for CUDA passes these tests too
    with pytest.raises(UserError, match="torch .* is built without CUDA") as raised:
        bind_device("cuda")
    assert not isinstance(raised.value, MachineError)  # no other host would do
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", mock.Mock(side_effect=RuntimeError("Found no NVIDIA driver on your system.\nMore")))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(
        MachineError, match=r"node7 .* no GPU is seen there .*unset\): Found no NVIDIA driver on your system\.$"
    ):
        bind_device("cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(MachineError, match="CUDA_VISIBLE_DEVICES 0,1"):
        bind_device("cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="hides every GPU") as raised:
        bind_device("cuda")
    assert not isinstance(raised.value, MachineError)


@pytest.mark.parametrize(
    "reason, dead",
    [
        ("CUDA unknown error - this may be due to an incorrectly set up environment, e.g. changing env variables.", True),
        ("CUDA driver initialization failed, you might not have a CUDA gpu.", True),
        (
            "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions? Error 802: system not yet initialized",
            True,
        ),
        ("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU.", False),
        ("No CUDA GPUs are available", False),
    ],
)
def test_under_auto_a_gpu_that_does_not_start_is_at_fault_and_a_missing_one_means_the_cpu(monkeypatch, reason, dead):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", mock.Mock(side_effect=RuntimeError(f"{reason}\nMore")))
    if dead:
        with pytest.raises(
            MachineError, match="^host node7 cannot be used: its GPUs do not start: .*; --device cpu runs without"
        ):
            find_hardware("auto")
    else:
        assert find_hardware("auto").capability is None
    assert bind_device("cpu") is False


def test_device_cpu_hides_the_gpus_before_torch_sees_them(monkeypatch, gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    for device in ("auto", "cuda"):
        hide_gpus(device)
    program = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "0,1\n"
    hide_gpus("cpu")
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "\n"
    with pytest.raises(UserError, match="--device cpu: this process has found its GPUs already"):
        bind_device("cpu")


def test_software_that_cannot_compute_on_a_gpu_is_at_fault(monkeypatch, tmp_path, gpus):
    refuse_software()
    for version, good in (("2.9.1+cu128", False), ("2.10.0a0+b4e4ee8.nv26", True), ("2.11.0+cu130", True)):
        monkeypatch.setattr(torch, "__version__", version)
        if good:
            refuse_software()
        else:
            with pytest.raises(MachineError, match=r"node7 .* its torch is 2\.9\.1\+cu128, and GPUs need 2\.10 or later"):
                bind_device()
    for name, value, reason in (
        ("CC", "/nowhere/cc", "its C compiler /nowhere/cc does not start"),
        ("CC", "/bin/false", "its C compiler /bin/false cannot compile Python.h"),
        ("PATH", str(tmp_path), "it has no C compiler"),
    ):
        with monkeypatch.context() as changed:
            changed.delenv("CC", raising=False)
            changed.setenv(name, value)
            with pytest.raises(MachineError, match=f"node7 .* fused kernels .* {reason}"):
                bind_device()
    monkeypatch.setattr("sysconfig.get_paths", lambda *_: {"include": str(tmp_path)})
    with pytest.raises(MachineError, match=f"cannot compile Python.h of {tmp_path}: .*Python.h: No such file"):
        bind_device()


FAULTS = (
    "CUDA error: uncorrectable ECC error encountered",
    "NCCL error\nncclUnhandledCudaError\nLast error:\nCuda failure 46 'CUDA-capable device(s) is/are busy or unavailable'",
)
BUGS = (
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: device-side assert triggered",
    "CUDA out of memory. Tried to allocate 2 GiB",
    "an unknown error",
)


@pytest.mark.parametrize("text", FAULTS + BUGS)
def test_an_error_in_a_run_is_the_hosts_only_if_no_program_causes_it(text):
    expected = MachineError if text in FAULTS else torch.AcceleratorError
    with pytest.raises(expected) as raised, naming_faults("a GPU failed"):
        raise torch.AcceleratorError(text)
    if text in FAULTS:
        assert str(raised.value) == f"host node7 cannot be used: a GPU failed: {text.splitlines()[-1]}"
        assert isinstance(raised.value.__cause__, torch.AcceleratorError)


HALF_ENGINES = {  # name: (files, what the message quotes)
    "without its torch extension": (
        {"__init__.py": "__version__ = '2.20.2'", "pytorch/__init__.py": "open('/nowhere/transformer_engine_torch.so')"},
        "FileNotFoundError",
    ),
    "without one of its requirements": (
        {"__init__.py": "__version__ = '2.20.2'", "pytorch/__init__.py": "import a_module_that_nobody_has"},
        "ModuleNotFoundError: No module named 'a_module_that_nobody_has'",
    ),
    "a folder that an uninstall left": ({"pytorch/__pycache__/old": ""}, "AttributeError"),
    "a folder that an uninstall left empty": ({"old": ""}, "ModuleNotFoundError"),
    "files that a full disk left empty": (
        {"__init__.py": "__version__ = '2.20.2'", "pytorch/__init__.py": ""},
        "AttributeError: module 'transformer_engine.pytorch' has no attribute 'Linear'",
    ),
}


def write_engine(root: Path, name: str) -> Path:
    for file, text in HALF_ENGINES[name][0].items():
        path = root / "transformer_engine" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


no_engine = pytest.mark.skipif(importable("transformer_engine"), reason="Transformer Engine is installed")


@no_engine
@pytest.mark.parametrize("name", HALF_ENGINES)
def test_half_an_engine_is_found_before_megatron_core_imports_it(monkeypatch, tmp_path, name):
    refuse_half_engine()
    monkeypatch.syspath_prepend(str(write_engine(tmp_path, name)))
    before = set(sys.modules)
    try:
        with pytest.raises(MachineError, match="host node7 .* Transformer Engine is there in part") as raised:
            refuse_half_engine()
    finally:
        for module in set(sys.modules) - before:
            del sys.modules[module]
    assert HALF_ENGINES[name][1] in str(raised.value) and str(tmp_path) in str(raised.value)


@no_engine
def test_an_engine_that_is_listed_and_not_there_is_half_an_engine(monkeypatch, tmp_path):
    listed = tmp_path / "transformer_engine-2.20.2.dist-info"
    listed.mkdir()
    (listed / "METADATA").write_text("Metadata-Version: 2.1\nName: transformer_engine\nVersion: 2.20.2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MachineError, match="host node7 .* is there in part .version 2.20.2 is listed as installed"):
        refuse_half_engine()


@no_engine
def test_a_run_with_half_an_engine_ends_with_one_line(tmp_path):
    engine = write_engine(tmp_path / "site", "a folder that an uninstall left")
    data = write_tokens(tmp_path / "words")
    program = f"import sys; sys.path.insert(0, {str(engine)!r}); from megatron_salt.pretrain import main; sys.exit(main(sys.argv[1:]))"
    words = argv(data_path=data, train_iters=3, outcome_file=tmp_path / "outcome")
    ended = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert ended.returncode == 5 and len(ended.stderr.splitlines()) == 1, ended.stderr
    assert ended.stderr.startswith("error: host node7 cannot be used: Transformer Engine is there in part")
    assert (tmp_path / "outcome").read_text() == "machine node7 job -.0 " + ended.stderr.removeprefix("error: ")


def test_a_run_with_a_missing_gpu_leaves_the_name_of_the_host(monkeypatch, tmp_path, gpus, capsys):
    """Rank 7 of 8 on a node that shows 7 GPUs; nobody else is there."""
    environment = dict(RANK="7", WORLD_SIZE="8", LOCAL_RANK="7", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(failure, "PATIENCE", 0.0)
    monkeypatch.setattr(failure, "RETRY_SECONDS", 0.0)
    gpus.device_count.return_value = 7
    data = write_tokens(tmp_path / "words")
    words = argv(data_path=data, train_iters=3, global_batch_size=16, outcome_file=tmp_path / "outcome", device="cuda")
    assert pretrain.main(words) == MachineError.status == 5
    assert (tmp_path / "outcome").read_text().startswith("machine node7 job -.0 host node7 cannot be used: LOCAL_RANK is 7")
    assert capsys.readouterr().err.count("error: host node7 cannot be used") == 1


def test_a_host_has_slurms_name_or_its_own(monkeypatch):
    assert this_host() == "node7"
    monkeypatch.delenv("SLURMD_NODENAME")
    monkeypatch.setattr("socket.gethostname", lambda: "laptop")
    assert this_host() == "laptop"
