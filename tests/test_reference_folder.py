"""The reference's cache on a disk: who may use an entry, broken ones, several processes, and the limit."""

import os
import warnings

import pytest
import torch
from helpers import adapter_of, load_perturbed

import fastforget as ff
from fastforget.files import PART
from fastforget.loss import UnlearnLoss
from fastforget.reference_folder import SCRATCH_SECONDS, frozen_digest


def loss_in(folder, model, **options):
    return UnlearnLoss(model, "npo", reference_cache_folder=folder, **options)


def value(loss, batch, seeds=(1, 2)):
    return float(loss(*(batch(3, seed) for seed in seeds)).loss.detach())


def test_another_run_computes_no_reference(tiny, batch, tmp_path):
    """Neither the adapter nor its rank is part of what is frozen."""
    first = loss_in(tmp_path / "cache", load_perturbed(tiny["llama"]))
    expected = value(first, batch)
    assert first.reference.forwards > 0 and oct((tmp_path / "cache").stat().st_mode)[-3:] == "700"
    again = loss_in(tmp_path / "cache", load_perturbed(tiny["llama"]))
    assert value(again, batch) == expected and again.reference.forwards == 0
    wider = loss_in(tmp_path / "cache", load_perturbed(tiny["llama"], r=8))
    value(wider, batch)
    assert wider.reference.forwards == 0
    other = loss_in(tmp_path / "cache", load_perturbed(tiny["llama"]))
    value(other, batch, seeds=(3, 4))
    assert other.reference.forwards > 0, "other examples"


def test_a_model_that_differs_in_one_weight_is_another(tiny, batch, tmp_path):
    model = load_perturbed(tiny["llama"])
    value(loss_in(tmp_path, model), batch)
    digest = frozen_digest(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1.0)
    assert frozen_digest(model) == digest
    model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.data[0, 0] += 1e-3
    changed = loss_in(tmp_path, model)
    value(changed, batch)
    assert frozen_digest(model) != digest and changed.reference.forwards > 0
    model.config.rms_norm_eps *= 2
    assert frozen_digest(model) not in (digest, changed.reference.folder._prefix.decode().split()[0])


@pytest.mark.parametrize("how", ["truncated", "empty", 0.001, 0.2, 0.9, "another's"])
def test_broken_entries_are_computed_again(tiny, batch, tmp_path, how):
    model = load_perturbed(tiny["llama"])
    expected = value(loss_in(tmp_path, model), batch)
    entries = sorted(tmp_path.iterdir())
    assert len(entries) == 3  # NPO's own; the retain term needs none
    content = bytearray(entries[0].read_bytes())
    if how == "another's":
        content = b"{}" + bytes(content)
    elif how in ("truncated", "empty"):
        content = content[: len(content) // 2 if how == "truncated" else 0]
    else:
        content[int(how * len(content))] ^= 1
    entries[0].write_bytes(content)
    again = loss_in(tmp_path, model)
    assert value(again, batch) == pytest.approx(expected, abs=1e-6) and again.reference.forwards == 1
    last = loss_in(tmp_path, model)
    assert value(last, batch) == pytest.approx(expected, abs=1e-6) and last.reference.forwards == 0, "it was replaced"


def test_the_least_recently_used_go(tiny, batch, tmp_path):
    model = load_perturbed(tiny["llama"])
    value(loss_in(tmp_path, model), batch)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    for age, path in enumerate(sorted(tmp_path.iterdir())):
        os.utime(path, (1000 + age, 1000 + age))
    oldest = min(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime)
    left = tmp_path / f".old{PART}"
    left.touch()
    os.utime(left, (1000, 1000))
    limited = loss_in(tmp_path, model, reference_cache_folder_bytes=size + 100)
    value(limited, batch, seeds=(5, 6))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= size + 100
    assert not oldest.exists() and not left.exists() and SCRATCH_SECONDS > 60


def test_processes_share_a_folder(tiny, batch, tmp_path):
    model = load_perturbed(tiny["llama"])
    torch.set_num_threads(1)
    expected = value(loss_in(tmp_path / "alone", model), batch)
    children = []
    for _ in range(4):
        child = os.fork()
        if not child:
            code = 1
            try:
                for _ in range(5):
                    loss = loss_in(tmp_path / "shared", model, reference_cache_folder_bytes=40_000)
                    code = 0 if abs(value(loss, batch) - expected) < 1e-6 else 2
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert not list((tmp_path / "shared").glob(f".*{PART}"))


def test_a_full_disk_is_told_once_and_training_goes_on(tiny, batch, tmp_path, monkeypatch):
    def full(path, state):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("fastforget.reference_folder.write_state", full)
    model = load_perturbed(tiny["llama"])
    step = ff.UnlearnStep(model, torch.optim.SGD, terms="npo", lr=0.1, reference_cache_folder=tmp_path)
    before = adapter_of(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(batch(2, 1), batch(2, 2))
        step(batch(2, 3), batch(2, 4))
    assert sum("No space left" in str(each.message) for each in caught) == 1 and not list(tmp_path.iterdir())
    assert any(not torch.equal(value, before[name]) for name, value in adapter_of(model).items())


def test_no_folder_without_a_cache(tiny, batch, tmp_path):
    value(loss_in(tmp_path, load_perturbed(tiny["llama"]), reference_cache_bytes=0), batch)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["file", "file/x", "/proc/x", "a" * 300])
def test_a_folder_that_cannot_be_is_found_at_once(tiny, tmp_path, where):
    (tmp_path / "file").touch()
    with pytest.raises(ff.FastforgetError, match="cannot hold what the reference said"):
        loss_in(tmp_path / where, load_perturbed(tiny["llama"]))


def test_what_cannot_be_removed_ends_no_run(model, batch, tmp_path):
    """Of a folder that several users share, some files are others'; a folder stands for one of them here."""
    left = tmp_path / f".others{PART}"
    left.mkdir()
    os.utime(left, (0, 0))
    value(loss_in(tmp_path, model), batch)
    assert left.exists() and len(list(tmp_path.glob("*.safetensors"))) == 3
