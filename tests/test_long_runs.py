"""What does not grow: memory and file handles over thousands of steps; and steps in several threads."""

import ctypes
import gc
import os
import threading

import pytest
import torch
from helpers import adapter_of, load_perturbed

import fastforget as ff


def resident():
    """Bytes of this process that are in memory, without what the heap keeps of freed objects."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def handles():
    return len(os.listdir("/proc/self/fd"))


def slope(steps, tiny, batch, folder, **lora):
    """Bytes a step by which memory grows after a warm-up, by least squares, and the same of file handles."""
    model = load_perturbed(tiny["llama"], **lora)
    step = ff.UnlearnStep(model, torch.optim.AdamW, terms="npo", lr=1e-5, reference_cache_folder=folder)
    batches = [(batch(2, seed, width=10), batch(2, seed + 50, width=10)) for seed in range(5)]
    places, memory, files = [], [], []
    for number in range(steps):
        out = step(*batches[number % len(batches)])
        assert out.loss.isfinite()
        if number >= steps // 4 and number % (steps // 40) == 0:
            places.append(number)
            memory.append(resident())
            files.append(handles())
    x = torch.tensor(places, dtype=torch.float64)
    x -= x.mean()
    return [float((x * torch.tensor(y, dtype=torch.float64)).sum() / x.square().sum()) for y in (memory, files)]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("steps", "targets"), [(400, ["q_proj"]), pytest.param(10_000, "all-linear", marks=pytest.mark.slow)]
)
def test_memory_and_file_handles_are_flat(tiny, batch, tmp_path, steps, targets):
    per_step, files = slope(steps, tiny, batch, tmp_path, target_modules=targets)
    print(f"{steps} steps: {per_step:.0f} bytes a step, {files:.5f} file handles a step")
    assert per_step < 1024 and abs(files) < 1e-3


def test_steps_in_two_threads_on_two_models_are_right(tiny, batch):
    def train(model, seed):
        step = ff.UnlearnStep(model, torch.optim.AdamW, terms="npo", lr=1e-3)
        for number in range(8):
            step(batch(2, seed + number), batch(2, seed + 50 + number), micro_batch=1)

    seeds = (0, 100)
    alone = [load_perturbed(tiny[kind]) for kind in ("llama", "opt")]
    for model, seed in zip(alone, seeds, strict=True):
        train(model, seed)
    together = [load_perturbed(tiny[kind]) for kind in ("llama", "opt")]
    threads = [threading.Thread(target=train, args=pair) for pair in zip(together, seeds, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        expected = adapter_of(other)
        assert all(torch.equal(value, expected[name]) for name, value in adapter_of(one).items())
