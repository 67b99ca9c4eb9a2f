"""Virtual CUDA: a process without a GPU that runs as if it had one, and records what a GPU would not forgive.

`install()` is called before anything of megatron is imported, in a process of its own: it cannot be undone. From then on
`torch.cuda.is_available()` is true, so the package takes its GPU branches and `cpu_seam.py` patches nothing. All memory is the CPU's;
each storage remembers whether it would lie on the GPU (`tensors.py`), torch.cuda answers as one H200 for each rank would, and NCCL is
gloo (`runtime.py`). A dispatch mode (`mode.py`), which every thread enters, records (`recorder.py`)

- operations between tensors of the GPU and tensors of the CPU, which CUDA refuses,
- CPU tensors in collectives of NCCL, which NCCL refuses,
- every place where the host waits for the device, with file and line,
- kernels, and the bytes that they read and write.

With TRITON_INTERPRET=1 in the environment, the output head's Triton kernels run in Triton's interpreter; each counts as one kernel.
`python -m tests.support.virtual_cuda -- FLAGS` runs pretrain with these flags and prints what was recorded.

What it cannot show: numbers of CUDA's kernels, races between streams, and anything that needs a driver.
"""

from tests.support.virtual_cuda.installation import install
from tests.support.virtual_cuda.recorder import Fault, Recorder, Report, Sync

__all__ = ["Fault", "Recorder", "Report", "Sync", "install"]
