"""Memory and time of the conversion of a large model, against transformers' from_pretrained and save_pretrained of the same directory.

    python benchmarks/convert_memory.py          minutes; needs 9 GB of disk, and for the rival 4 GB of memory

A random Llama of 1.5B parameters in bfloat16 is written a few rows at a time, imported, and exported again. Every conversion has a
process of its own: VmHWM is its largest resident memory, pages of mapped files included. Our export is compared with the source, bit for
bit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from results import above_zero, result

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_salt.convert.hugging_face.families import model_of_config
from megatron_salt.convert.hugging_face.safetensors_writer import safetensors_file
from megatron_salt.convert.parts import parts_of

IDS = 32_000
SHAPE = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=IDS, hidden_size=2048, intermediate_size=5632,
    num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048, rms_norm_eps=1e-5, torch_dtype="bfloat16",
    tie_word_embeddings=False,
)  # fmt: skip
ROWS = 16 << 20
"""Bytes of rows that are drawn at one time."""
CHILD = """
import sys, {module}
status = {call}
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(status)
"""
CONVERT = CHILD.format(module="megatron_salt.tools.convert_checkpoint as tool", call="tool.main(sys.argv[1:])")
RIVAL = """
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2], max_shard_size="5GB")
"""
NOTHING = CHILD.format(module="megatron_salt.convert.import_checkpoint", call="0")


@dataclass(frozen=True)
class Cost:
    """What a process cost."""

    gigabytes: float
    """VmHWM, in GB."""
    seconds: float


def cost_of(program: str, *words: str) -> Cost:
    """Run a program that prints its VmHWM last."""
    start = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert found is not None, done.stdout
    return Cost(int(found[1]) * 1024 / 1e9, time.perf_counter() - start)


def make_source(directory: Path, gigabytes: float) -> float:
    """A directory of transformers of about this size; returns its size in GB."""
    layer = 2 * (2 * 2048**2 + 2 * 2048 * 256 + 3 * 2048 * 5632 + 2 * 2048)
    config = SHAPE | {"num_hidden_layers": max(1, round((gigabytes * 1e9 - 4 * IDS * 2048) / layer))}
    foreign = model_of_config(config, "config.json")
    parts = parts_of(foreign.architecture, foreign.model, IDS, foreign.context)
    shapes = {name: shape for part in parts for name, shape in part.sources}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text("{}")
    (directory / "tokenizer.json").write_text(tokenizer_json())
    torch.manual_seed(0)
    with safetensors_file(directory / "model.safetensors", shapes, torch.bfloat16) as write_rows:
        for name, shape in shapes.items():
            step = max(1, ROWS // (4 * torch.Size(shape[1:]).numel()))
            for first in range(0, shape[0], step):
                rows = torch.randn(min(step, shape[0] - first), *shape[1:])
                write_rows(name, first, 1 + 0.1 * rows if len(shape) == 1 else 0.02 * rows)
    return (directory / "model.safetensors").stat().st_size / 1e9


def tokenizer_json() -> str:
    """A tokenizer of bytes and an end of document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer.to_str()


def same_weights(one: Path, other: Path) -> bool:
    """Whether two safetensors files of the same names hold the same bytes."""
    return subprocess.run(["cmp", "--silent", one, other]).returncode == 0


def plain_copy(source: Path, target: Path) -> float:
    """Seconds to write the same bytes to the disk without looking at them."""
    start = time.perf_counter()
    shutil.copyfile(source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())
    target.unlink()
    return time.perf_counter() - start


def main() -> None:
    """Print a table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=above_zero, default=3.0, help="size of the model")
    parser.add_argument("--no-rival", action="store_true", help="without transformers")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="convert-") as folder:
        home = Path(folder)
        source, weights = home / "source", "model.safetensors"
        size = make_source(source, flags.gb)
        print(f"{size:.2f} GB of weights, the largest tensor {2 * SHAPE['intermediate_size'] * 2048 * 2 / 1e9:.3f} GB as ours")
        rows = {"imports of the program alone": cost_of(NOTHING)}
        copy = plain_copy(source / weights, home / "copy")
        rows["import --no-verify, with the losses"] = cost_of(
            CONVERT, "import", str(source), "--to", str(home / "in"), "--no-verify"
        )
        rows["export"] = cost_of(CONVERT, "export", str(home / "in"), str(home / "out"))
        assert same_weights(source / weights, home / "out" / weights), "the export is not the source"
        shutil.rmtree(home / "out")
        if not flags.no_rival:
            rival = CHILD.format(module="os", call="0").replace("status = 0", RIVAL + "status = 0")
            rows["transformers: from_pretrained, save_pretrained"] = cost_of(rival, str(source), str(home / "rival"))
    print(f"{'':48}{'VmHWM, GB':>12}{'seconds':>10}")
    for name, cost in rows.items():
        print(f"{name:48}{cost.gigabytes:>12.2f}{cost.seconds:>10.1f}")
    print(f"{'a copy of the weights, synced':48}{'':>12}{copy:>10.1f}")
    for name in ("import", "export"):
        [cost] = [cost for key, cost in rows.items() if key.split(" ")[0] == name]
        result(f"{name}_vmhwm_gb_{flags.gb:g}", cost.gigabytes, 1.5, lower_is_better=True)


if __name__ == "__main__":
    main()
