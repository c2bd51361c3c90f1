"""Models that benchmarks build in the process, copies that share their weights, and the groups of a GPU's kernels."""

import pytest
import torch
import transformers

import fastforget as ff
from benchmarks import loops, step
from fastforget.fusing import is_fused


@pytest.mark.parametrize("shape", ["tiny", "tiny-llama"])
def test_a_model_that_was_built_in_the_process_is_the_ordinary_one(shape):
    setting = loops.StepSetting(shape=shape)
    built = loops.load_policy(setting).unload().eval()
    assert loops.load_policy(setting).get_input_embeddings().weight.equal(built.get_input_embeddings().weight)
    ordinary = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**loops.SHAPES[shape])
    ).eval()
    ordinary.load_state_dict(built.state_dict())
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert built(ids).logits.equal(ordinary(ids).logits)


@pytest.mark.parametrize("bits, kind", [(8, "Linear8bitLt"), (4, "Linear4bit")])
def test_quantised_copies_share_their_weights_and_not_their_layers(bits, kind):
    setting = loops.StepSetting(shape="tiny-llama", bits=bits, sequences=2, length=16, batches=1)
    model = loops.load_policy(setting)
    copied = loops.shared_copy(model)
    assert ff.fuse(copied).refused == {} and not any(map(is_fused, model.modules()))
    assert sum(type(module).__name__ == kind and not hasattr(module, "base_layer") for module in copied.modules()) == 14
    assert all(one is other for one, other in zip(model.parameters(), copied.parameters(), strict=True))
    (batches,) = loops.epoch(setting)
    ours = ff.UnlearnLoss(copied, "grad_diff")(batches["forget"], batches["retain"]).loss
    theirs = ff.UnlearnLoss(model, "grad_diff")(batches["forget"], batches["retain"]).loss
    assert ours.isfinite() and abs(ours - theirs) < 1e-3
    ours = ff.UnlearnLoss(copied, "grad_diff")(batches["forget"], batches["retain"]).loss  # after its own have run
    assert ours.isfinite() and abs(ours - theirs) < 1e-3


@pytest.mark.parametrize(
    "kernel, group",
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "GEMM"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_i16832gemm_s8_128x64_128x3_tn_align16>", "GEMM"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x64_1x4", "attention"),
        ("label_tile_kernel", "head"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda", "copies"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl<at::nati", "element-wise"),
        ("triton_poi_fused_add_mul_silu_3", "element-wise"),
    ],
)
def test_groups_of_kernels(kernel, group):
    assert step.group_of(kernel) == group
